"""Tf-KD: a virtual teacher in place of a trained one."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import DistillationLoss
from .checks import check_labels, check_scalar, check_share, check_student_logits, compute_dtype

# The virtual teacher's probability of the label: the official code's.
_CORRECT = 0.99
# Above this strength the trainer warns. The official code has 0.1 and 0.01.
_STRONG = 0.3


def tfkd_loss(
    student_logits: Tensor,
    labels: Tensor,
    *,
    alpha: float = 0.1,
    temperature: float = 20.0,
    multiplier: float = 100.0,
) -> Tensor:
    r"""Teacher-free distillation loss Tf-KD_reg of "Revisiting Knowledge Distillation via Label Smoothing Regularization" (CVPR
    2020, https://arxiv.org/abs/1909.11723), section 4.

    There is no teacher. A virtual one is right in each image and knows nothing of the other classes:

    .. math::
        L_\text{Tf-KD} = \frac{\alpha \, m}{C} \, \text{KL}(V^\tau \Vert S), \qquad
        V^\tau = \text{softmax}(v / \tau), \quad v_t = 0.99, \quad v_{i \ne t} = \frac{0.01}{C - 1}

    as the mean over the batch, where :math:`S` is the student's softmax and :math:`t` the label. At the default temperature
    :math:`V^\tau` is nearly uniform: the loss is a label smoothing whose strength is :math:`\alpha m / C` (0.1 with 100
    classes, 0.01 with 1000). Add the student's own classification loss to it, times :math:`1 - \alpha`; the trainer does so
    with [`TfKDLoss`].

    Args:
        student_logits: [B, C] float logits of the student.
        labels: [B] integer classes, or [B, C] float mixup / cutmix labels, which mix the virtual teachers of their classes.
        alpha: weight of the term, 0 <= alpha <= 1.
        temperature: :math:`\tau` of the virtual teacher, > 0.
        multiplier: :math:`m`, >= 0.

    The defaults, and the division by C, are those of the official code
    (github.com/yuanli2333/Teacher-free-Knowledge-Distillation).
    Differs from the official code: mixup labels are taken (there they are an error).

    Returns:
        A scalar: float64 for float64 student logits, otherwise float32, in which the arithmetic runs, autocast or not.

    Raises:
        ValueError: shapes or dtypes don't fit, C < 2, B = 0, alpha, temperature or multiplier out of range, or labels that are
            outside 0..C-1 or rows that don't sum to one (looked at on the CPU only, since a GPU would have to wait).
        TypeError: not a tensor.

    Example:
        >>> import torch
        >>> from nkd_hf.losses import tfkd_loss
        >>> student_logits = torch.tensor([[1.0, 2.0, 0.5], [0.0, 0.0, 3.0]], requires_grad=True)
        >>> loss = tfkd_loss(student_logits, torch.tensor([1, 2]))
        >>> loss.backward()
        >>> f"{loss.item():.4f}"
        '1.9151'
    """
    _check_settings(alpha, temperature, multiplier)
    check_student_logits(student_logits)
    check_labels(labels, student_logits.shape)

    num_classes = student_logits.shape[1]
    dtype = compute_dtype(student_logits)
    if labels.ndim == 2:
        share = labels.to(dtype)
    else:
        share = torch.zeros_like(student_logits, dtype=dtype).scatter_(-1, labels.long().unsqueeze(-1), 1)
    virtual = share * _CORRECT + (1 - share) * ((1 - _CORRECT) / (num_classes - 1))
    teacher_prob = (virtual / temperature).softmax(-1)
    student_log_prob = student_logits.log_softmax(-1, dtype=dtype)
    return alpha * multiplier / num_classes * F.kl_div(student_log_prob, teacher_prob, reduction="batchmean")


class TfKDLoss(DistillationLoss):
    """[`tfkd_loss`] as a module that returns its one component by name.

    Its arguments, and what it raises, are those of [`tfkd_loss`]. `1 - alpha` is its `task_weight`, with which the trainer
    multiplies the task loss, whatever other losses are added to this one.

    Example:
        >>> import torch
        >>> from nkd_hf.losses import TfKDLoss
        >>> distillation_loss = TfKDLoss()
        >>> distillation_loss
        TfKDLoss(alpha=0.1, temperature=20.0, multiplier=100.0)
        >>> distillation_loss.task_weight
        0.9
        >>> list(distillation_loss(torch.zeros(2, 10), torch.tensor([3, 7])))
        ['tfkd']
    """

    name = "Tf-KD"
    paper = "https://arxiv.org/abs/1909.11723"
    citation = """@inproceedings{yuan2020revisiting,
  title     = {Revisiting Knowledge Distillation via Label Smoothing Regularization},
  author    = {Yuan, Li and Tay, Francis E. H. and Li, Guilin and Wang, Tao and Feng, Jiashi},
  booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
  year      = {2020}
}"""

    def __init__(self, alpha: float = 0.1, temperature: float = 20.0, multiplier: float = 100.0):
        super().__init__()
        _check_settings(alpha, temperature, multiplier)
        self.alpha = alpha
        self.temperature = temperature
        self.multiplier = multiplier

    @property
    def task_weight(self) -> float:
        """What the task loss is multiplied with."""
        return 1 - self.alpha

    def forward(self, student_logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Returns the weighted component."""
        loss = tfkd_loss(
            student_logits, labels, alpha=self.alpha, temperature=self.temperature, multiplier=self.multiplier
        )
        return {"tfkd": loss}

    def describe_misfit(self, num_classes: int) -> str | None:
        strength = self.alpha * self.multiplier / num_classes
        if strength <= _STRONG or self.multiplier <= num_classes:
            return None
        return (
            "alpha * multiplier / classes of tfkd should be about 0.1, as the official code has it for 100 classes, got "
            f"{self.alpha:g} * {self.multiplier:g} / {num_classes} = {strength:.2g}. The labels then count for little. Set loss_args "
            f"multiplier to the number of classes, {num_classes}"
        )

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, temperature={self.temperature}, multiplier={self.multiplier}"


def _check_settings(alpha: float, temperature: float, multiplier: float) -> None:
    check_share("alpha", alpha)
    check_scalar("temperature", temperature, positive=True)
    check_scalar("multiplier", multiplier)
