"""NKD: normalised knowledge distillation, from a teacher to a student."""

import math

import torch
from torch import Tensor

from .base import DistillationLoss
from .checks import check_labels, check_other_logits, check_scalar, check_student_logits, compute_dtype
from .normalized import drop_targets, normalized_loss, target_log_odds


def nkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    gamma: float = 1.5,
    temperature: float = 1.0,
) -> Tensor:
    r"""Normalised knowledge distillation loss of "From Knowledge Distillation to Self-Knowledge Distillation: A Unified
    Approach with Normalized Loss and Customized Soft Labels" (ICCV 2023, https://arxiv.org/abs/2303.13005).

    It splits the distillation loss at the target class :math:`t` and gives the other classes a softmax of their own, in
    teacher and student alike, so that their probabilities sum to one on both sides and can become equal:

    .. math::
        L_\text{NKD} = -T_t \log S_t
            - \gamma \lambda^2 \sum_{i \ne t} \mathcal N(T^\lambda)_i \log \mathcal N(S^\lambda)_i

    as the mean over the batch, where :math:`T` and :math:`S` are the softmax of teacher and student,
    :math:`\mathcal N(\cdot^\lambda)` the softmax at temperature :math:`\lambda` without the target class. The
    temperature doesn't touch the target's term. Add the student's own classification loss to it.

    Args:
        student_logits: [B, C] float logits of the student.
        teacher_logits: [B, C] float logits of the teacher, of any float dtype; they get no gradient.
        labels: [B] integer classes, or [B, C] float mixup / cutmix labels, whose heaviest class is the target.
        gamma: weight of the non-target term, >= 0.
        temperature: :math:`\lambda`, > 0.

    The defaults are the paper's for its CNN students on ImageNet; it has gamma 1.0 and temperature 1.0 for DeiT, gamma
    3.5 and temperature 3.0 on CIFAR-100.

    Returns:
        A scalar: float64 for float64 student logits, otherwise float32, in which the arithmetic runs, autocast or not.
        Its gradient has the student's dtype and can't be differentiated again (`create_graph=True` is a RuntimeError).
        Not finite where an input isn't, but for classes that the teacher masks with -inf, whose probability is zero; and
        where logits of one row lie further apart than float32 reaches.

    Raises:
        ValueError: shapes or dtypes don't fit, C < 2, B = 0, gamma or temperature out of range, or labels that are
            outside 0..C-1 or rows that don't sum to one (looked at on the CPU only, since a GPU would have to wait).
        TypeError: not a tensor.

    Example:
        >>> import torch
        >>> from nkd_hf.losses import nkd_loss
        >>> student_logits = torch.tensor([[1.0, 2.0, 0.5], [0.0, 0.0, 3.0]], requires_grad=True)
        >>> teacher_logits = torch.tensor([[1.0, 4.0, 0.0], [0.5, 0.0, 2.0]])
        >>> loss = nkd_loss(student_logits, teacher_logits, torch.tensor([1, 2]))
        >>> loss.backward()
        >>> f"{loss.item():.4f}"
        '1.2286'
        >>> student_logits.grad.shape
        torch.Size([2, 3])
    """
    target_term, non_target_term, _ = _components(student_logits, teacher_logits, labels, gamma, temperature)
    return target_term + non_target_term


class NKDLoss(DistillationLoss):
    """[`nkd_loss`] as a module that returns its two components by name; their sum is the loss.

    Its arguments, and what it raises, are those of [`nkd_loss`].

    Example:
        >>> import torch
        >>> from nkd_hf.losses import NKDLoss
        >>> distillation_loss = NKDLoss(gamma=1.0)
        >>> distillation_loss
        NKDLoss(gamma=1.0, temperature=1.0)
        >>> components = distillation_loss(torch.zeros(2, 10), torch.zeros(2, 10), torch.tensor([3, 7]))
        >>> {name: f"{value.item():.4f}" for name, value in components.items()}
        {'nkd_target': '0.2303', 'nkd_non_target': '2.1972'}
    """

    name = "NKD"
    paper = "https://arxiv.org/abs/2303.13005"
    citation = """@inproceedings{yang2023from,
  title     = {From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with Normalized Loss and Customized Soft Labels},
  author    = {Yang, Zhendong and Zeng, Ailing and Li, Zhe and Zhang, Tianke and Yuan, Chun and Li, Yu},
  booktitle = {Proceedings of the IEEE/CVF International Conference on Computer Vision (ICCV)},
  year      = {2023}
}"""
    works_from_top_k = True

    def __init__(self, gamma: float = 1.5, temperature: float = 1.0):
        super().__init__()
        check_scalar("gamma", gamma)
        check_scalar("temperature", temperature, positive=True)
        self.gamma = gamma
        self.temperature = temperature

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, label_smoothing: float | None = None
    ) -> dict[str, Tensor]:
        """Returns the weighted components; a `label_smoothing` asks for the task loss too, see [`DistillationLoss`]."""
        target_term, non_target_term, task_loss = _components(
            student_logits, teacher_logits, labels, self.gamma, self.temperature, label_smoothing
        )
        components = {"nkd_target": target_term, "nkd_non_target": non_target_term}
        return components if task_loss is None else {"task": task_loss, **components}

    def extra_repr(self) -> str:
        return f"gamma={self.gamma}, temperature={self.temperature}"


def _components(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    gamma: float,
    temperature: float,
    label_smoothing: float | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    check_scalar("gamma", gamma)
    check_scalar("temperature", temperature, positive=True)
    check_student_logits(student_logits)
    num_classes = student_logits.shape[1]
    check_other_logits("teacher_logits", teacher_logits, student_logits, f"load a {num_classes}-class teacher")
    check_labels(labels, student_logits.shape)

    labels = labels if labels.ndim == 2 else labels.long()
    target = labels.argmax(-1, keepdim=True) if labels.ndim == 2 else labels.unsqueeze(-1)
    dtype = compute_dtype(student_logits)
    with torch.no_grad():
        rest_logits = drop_targets(teacher_logits, target, temperature, dtype)
        peak = rest_logits.amax(-1, keepdim=True)
        # a teacher that rules out all other classes says nothing of them: a softmax over minus infinity is 0 / 0
        is_certain = peak == -math.inf
        teacher_non_target_prob = rest_logits.softmax(-1).masked_fill_(is_certain, 0)
        if temperature == 1:
            log_peak = teacher_non_target_prob.amax(-1, keepdim=True).log()
            teacher_target_prob = target_log_odds(teacher_logits, target, peak, log_peak).sigmoid()
            target_logits = teacher_logits.gather(-1, target).to(dtype)
            teacher_target_prob = torch.where(is_certain, 1 + 0 * target_logits, teacher_target_prob)
        else:
            teacher_target_prob = teacher_logits.softmax(-1, dtype=dtype).gather(-1, target)
        if labels.ndim == 2:
            # the labels' values are not used, but one that is nan or inf must not pass for a class
            teacher_target_prob = teacher_target_prob + 0 * labels.gather(-1, target).to(dtype)
        del rest_logits  # one matrix less at the peak
    task = {} if label_smoothing is None else {"task_labels": labels, "label_smoothing": label_smoothing}
    target_term, non_target_term, task_loss = normalized_loss(
        student_logits, target, teacher_target_prob, teacher_non_target_prob, temperature, **task
    )
    return target_term, gamma * non_target_term, task_loss
