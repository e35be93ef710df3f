"""DKD: decoupled knowledge distillation."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import DistillationLoss
from .checks import check_flag, check_labels, check_other_logits, check_scalar, check_student_logits, compute_dtype
from .standardized import describe_standardize, standardize_logits


def dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 6.0,
    temperature: float = 4.0,
    standardize: bool = False,
    logit_moments: Tensor | None = None,
) -> Tensor:
    r"""Decoupled knowledge distillation loss of "Decoupled Knowledge Distillation" (CVPR 2022,
    https://arxiv.org/abs/2203.08679), equation 7.

    KD's divergence falls into two, which get a weight each: that of the target :math:`t` against all other classes
    together, and that among the other classes:

    .. math::
        L_\text{DKD} = \tau^2 \big( \alpha \, \text{KL}(b^T \Vert b^S)
            + \beta \, \text{KL}(\hat T \Vert \hat S) \big), \qquad b = (p_t, 1 - p_t), \quad \hat p = \mathcal N(p)

    as the mean over the batch, where :math:`p` is the softmax of teacher :math:`T` and student :math:`S` at temperature
    :math:`\tau`, and :math:`\mathcal N` omits the target class. Add the student's own classification loss to it.

    Args:
        student_logits: [B, C] float logits of the student.
        teacher_logits: [B, C] float logits of the teacher, of any float dtype; they get no gradient.
        labels: [B] integer classes, or [B, C] float mixup / cutmix labels, whose heaviest class is the target.
        alpha: weight of the target term, >= 0.
        beta: weight of the non-target term, >= 0.
        temperature: :math:`\tau`, > 0.
        standardize: whether the logits of both are standardised first, see [`standardize_logits`].
        logit_moments: [B, 2] mean and unbiased standard deviation of the teacher's logits, for `standardize` where some of
            `teacher_logits` are approximations; None computes them.

    The defaults are those of github.com/yzd-v/cls_KD; the paper chooses beta for each pair of teacher and student.
    Differs from cls_KD: mixup labels are taken (there they are an error), in NKD's way.

    Returns:
        A scalar: float64 for float64 student logits, otherwise float32, in which the arithmetic runs, autocast or not.
        Not finite with `standardize` where the teacher masks a class with -inf.

    Raises:
        ValueError: shapes or dtypes don't fit, C < 2, B = 0, alpha, beta or temperature out of range, standardize no bool, or
            labels that are outside 0..C-1 or rows that don't sum to one (looked at on the CPU only, since a GPU would have
            to wait).
        TypeError: not a tensor.

    Example:
        >>> import torch
        >>> from nkd_hf.losses import dkd_loss
        >>> student_logits = torch.tensor([[1.0, 2.0, 0.5], [0.0, 0.0, 3.0]], requires_grad=True)
        >>> teacher_logits = torch.tensor([[1.0, 4.0, 0.0], [0.5, 0.0, 2.0]])
        >>> loss = dkd_loss(student_logits, teacher_logits, torch.tensor([1, 2]))
        >>> loss.backward()
        >>> f"{loss.item():.4f}"
        '0.5930'
    """
    return sum(
        _components(student_logits, teacher_logits, labels, alpha, beta, temperature, standardize, logit_moments)
    )


class DKDLoss(DistillationLoss):
    """[`dkd_loss`] as a module that returns its two components by name; their sum is the loss.

    Its arguments, and what it raises, are those of [`dkd_loss`].

    Example:
        >>> import torch
        >>> from nkd_hf.losses import DKDLoss
        >>> distillation_loss = DKDLoss(beta=8.0)
        >>> distillation_loss
        DKDLoss(alpha=1.0, beta=8.0, temperature=4.0)
        >>> list(distillation_loss(torch.zeros(2, 10), torch.zeros(2, 10), torch.tensor([3, 7])))
        ['dkd_target', 'dkd_non_target']
    """

    name = "DKD"
    paper = "https://arxiv.org/abs/2203.08679"
    citation = """@inproceedings{zhao2022decoupled,
  title     = {Decoupled Knowledge Distillation},
  author    = {Zhao, Borui and Cui, Quan and Song, Renjie and Qiu, Yiyu and Liang, Jiajun},
  booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
  year      = {2022}
}"""

    def __init__(self, alpha: float = 1.0, beta: float = 6.0, temperature: float = 4.0, standardize: bool = False):
        super().__init__()
        check_scalar("alpha", alpha)
        check_scalar("beta", beta)
        check_scalar("temperature", temperature, positive=True)
        check_flag("standardize", standardize)
        self.alpha = alpha
        self.beta = beta
        self.temperature = temperature
        self.standardize = standardize

    @property
    def soft_temperature(self) -> float:
        """The temperature of the teacher's softmax."""
        return self.temperature

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, logit_moments: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Returns the weighted components."""
        target_term, non_target_term = _components(
            student_logits, teacher_logits, labels,
            self.alpha, self.beta, self.temperature, self.standardize, logit_moments,
        )  # fmt: skip
        return {"dkd_target": target_term, "dkd_non_target": non_target_term}

    def extra_repr(self) -> str:
        return (
            f"alpha={self.alpha}, beta={self.beta}, temperature={self.temperature}"
            f"{describe_standardize(self.standardize)}"
        )


def _components(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    alpha: float,
    beta: float,
    temperature: float,
    standardize: bool,
    logit_moments: Tensor | None,
) -> tuple[Tensor, Tensor]:
    check_scalar("alpha", alpha)
    check_scalar("beta", beta)
    check_scalar("temperature", temperature, positive=True)
    check_flag("standardize", standardize)
    check_student_logits(student_logits)
    batch_size, num_classes = student_logits.shape
    check_other_logits("teacher_logits", teacher_logits, student_logits, f"load a {num_classes}-class teacher")
    check_labels(labels, student_logits.shape)

    target = labels.argmax(-1, keepdim=True) if labels.ndim == 2 else labels.long().unsqueeze(-1)
    is_target = torch.zeros_like(student_logits, dtype=torch.bool).scatter_(-1, target, True)
    dtype = compute_dtype(student_logits)
    student_logits, teacher_logits = student_logits.to(dtype), teacher_logits.detach().to(dtype)
    if standardize:
        student_logits, teacher_logits = (
            standardize_logits(student_logits),
            standardize_logits(teacher_logits, logit_moments),
        )
    student_binary, student_rest = _log_probs(student_logits / temperature, target, is_target)
    teacher_binary, teacher_rest = _log_probs(teacher_logits / temperature, target, is_target)
    # log 0 at the target, where the teacher's probability is 0 too, would make 0 * -inf = nan
    student_rest = student_rest.masked_fill(is_target, 0)
    target_term = F.kl_div(student_binary, teacher_binary.exp(), reduction="sum")
    # a teacher that rules out all other classes says nothing of them: a softmax over minus infinity is 0 / 0
    is_certain = teacher_logits.masked_fill(is_target, -math.inf).amax(-1, keepdim=True) == -math.inf
    non_target_term = F.kl_div(student_rest, teacher_rest.exp().masked_fill(is_certain, 0), reduction="sum")
    scale = temperature**2 / batch_size
    return alpha * scale * target_term, beta * scale * non_target_term


def binary_log_probs(logits: Tensor, rest_logits: Tensor, target: Tensor) -> Tensor:
    """Log-probabilities [B, 2] of the target [B, 1] and of all the rest, whose logits have -inf at the target."""
    # from the log-odds, so that a rest of small probability keeps its digits
    target_logits = logits.gather(-1, target)
    log_odds = target_logits - rest_logits.logsumexp(-1, keepdim=True)
    # nan where the target's logit has overflowed to inf, as in a softmax: its sigmoid would be a perfect 1
    log_odds = log_odds + 0 * target_logits.relu()
    return torch.cat([F.logsigmoid(log_odds), F.logsigmoid(-log_odds)], dim=-1)


def _log_probs(logits: Tensor, target: Tensor, is_target: Tensor) -> tuple[Tensor, Tensor]:
    """[`binary_log_probs`], and log-probabilities [B, C] among the rest, where the target has -inf."""
    rest_logits = logits.masked_fill(is_target, -math.inf)
    return binary_log_probs(logits, rest_logits, target), rest_logits.log_softmax(-1)
