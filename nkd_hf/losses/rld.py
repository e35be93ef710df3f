"""RLD: refined logit distillation, which corrects a teacher where it is wrong."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import DistillationLoss
from .checks import check_flag, check_labels, check_other_logits, check_scalar, check_student_logits, compute_dtype
from .dkd import binary_log_probs
from .standardized import describe_standardize, standardize_logits


def rld_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 0.5,
    temperature: float = 1.0,
    target_temperature: float = 1.0,
    standardize: bool = False,
    logit_moments: Tensor | None = None,
) -> Tensor:
    r"""Refined logit distillation loss of "Knowledge Distillation with Refined Logits" (ICCV 2025,
    https://arxiv.org/abs/2408.07703).

    Where the teacher is wrong, the label and the teacher contradict each other. So the student learns how confident the
    teacher is, whatever class that is of, and relations among the classes that the teacher puts below the target :math:`t`:

    .. math::
        L_\text{RLD} = \alpha \tau_t^2 \, \text{KL}(b^T \Vert b^S)
            + \beta \tau^2 \, \text{KL}(\mathcal M(T^\tau) \Vert \mathcal M(S^\tau)), \qquad
        b^T = (\max_i T^{\tau_t}_i, 1 - \max_i T^{\tau_t}_i), \quad b^S = (S^{\tau_t}_t, 1 - S^{\tau_t}_t)

    as the mean over the batch, where :math:`T^\tau` and :math:`S^\tau` are the softmax of teacher and student at temperature
    :math:`\tau`, and :math:`\mathcal M` omits the target and each class whose teacher's logit is not below the target's. An
    image for which no class is left has no second term. Add the student's own classification loss to it.

    Args:
        student_logits: [B, C] float logits of the student.
        teacher_logits: [B, C] float logits of the teacher, of any float dtype; they get no gradient.
        labels: [B] integer classes, or [B, C] float mixup / cutmix labels, whose heaviest class is the target.
        alpha: weight of the confidence term, >= 0.
        beta: weight of the correlation term, >= 0.
        temperature: :math:`\tau` of the correlation term, > 0.
        target_temperature: :math:`\tau_t` of the confidence term, > 0.
        standardize: whether the logits of both are standardised first, see [`standardize_logits`].
        logit_moments: [B, 2] mean and unbiased standard deviation of the teacher's logits, for `standardize` where some of
            `teacher_logits` are approximations; None computes them.

    The defaults are those of the official code (github.com/zju-SWJ/RLD) for ResNet-34 to ResNet-18 on ImageNet; it has beta 2
    for ResNet-50 to MobileNet, and beta 8 and temperature 4 on CIFAR-100.
    Differs from the official code: mixup labels are taken, in NKD's way, and the loss begins with its full weight (there it
    grows over 20 epochs on CIFAR-100).

    Returns:
        A scalar: float64 for float64 student logits, otherwise float32, in which the arithmetic runs, autocast or not.
        Not finite with `standardize` where the teacher masks a class with -inf.

    Raises:
        ValueError: shapes or dtypes don't fit, C < 2, B = 0, a weight or a temperature out of range, standardize no bool, or
            labels that are outside 0..C-1 or rows that don't sum to one (looked at on the CPU only, since a GPU would have
            to wait).
        TypeError: not a tensor.

    Example:
        >>> import torch
        >>> from nkd_hf.losses import rld_loss
        >>> student_logits = torch.tensor([[1.0, 2.0, 0.5], [0.0, 0.0, 3.0]], requires_grad=True)
        >>> teacher_logits = torch.tensor([[1.0, 4.0, 0.0], [0.5, 0.0, 2.0]])
        >>> loss = rld_loss(student_logits, teacher_logits, torch.tensor([1, 2]))
        >>> loss.backward()
        >>> f"{loss.item():.4f}"
        '0.2078'
    """
    return sum(
        _components(
            student_logits, teacher_logits, labels,
            alpha, beta, temperature, target_temperature, standardize, logit_moments,
        )
    )  # fmt: skip


class RLDLoss(DistillationLoss):
    """[`rld_loss`] as a module that returns its two components by name; their sum is the loss.

    Its arguments, and what it raises, are those of [`rld_loss`].

    Example:
        >>> import torch
        >>> from nkd_hf.losses import RLDLoss
        >>> distillation_loss = RLDLoss(beta=2.0)
        >>> distillation_loss
        RLDLoss(alpha=1.0, beta=2.0, temperature=1.0, target_temperature=1.0)
        >>> list(distillation_loss(torch.zeros(2, 10), torch.zeros(2, 10), torch.tensor([3, 7])))
        ['rld_confidence', 'rld_correlation']
    """

    name = "RLD"
    paper = "https://arxiv.org/abs/2408.07703"
    citation = """@inproceedings{sun2025knowledge,
  title     = {Knowledge Distillation with Refined Logits},
  author    = {Sun, Wujie and Chen, Defang and Lyu, Siwei and Chen, Genlang and Chen, Chun and Wang, Can},
  booktitle = {Proceedings of the IEEE/CVF International Conference on Computer Vision (ICCV)},
  year      = {2025}
}"""

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 0.5,
        temperature: float = 1.0,
        target_temperature: float = 1.0,
        standardize: bool = False,
    ):
        super().__init__()
        _check_settings(alpha, beta, temperature, target_temperature, standardize)
        self.alpha = alpha
        self.beta = beta
        self.temperature = temperature
        self.target_temperature = target_temperature
        self.standardize = standardize

    @property
    def soft_temperature(self) -> float:
        """The temperature of the correlation term; the confidence term has `target_temperature`."""
        return self.temperature

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, logit_moments: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Returns the weighted components."""
        confidence_term, correlation_term = _components(
            student_logits, teacher_logits, labels,
            self.alpha, self.beta, self.temperature, self.target_temperature, self.standardize, logit_moments,
        )  # fmt: skip
        return {"rld_confidence": confidence_term, "rld_correlation": correlation_term}

    def extra_repr(self) -> str:
        return (
            f"alpha={self.alpha}, beta={self.beta}, temperature={self.temperature}, "
            f"target_temperature={self.target_temperature}{describe_standardize(self.standardize)}"
        )


def _check_settings(
    alpha: float, beta: float, temperature: float, target_temperature: float, standardize: bool
) -> None:
    check_scalar("alpha", alpha)
    check_scalar("beta", beta)
    check_scalar("temperature", temperature, positive=True)
    check_scalar("target_temperature", target_temperature, positive=True)
    check_flag("standardize", standardize)


def _components(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    alpha: float,
    beta: float,
    temperature: float,
    target_temperature: float,
    standardize: bool,
    logit_moments: Tensor | None,
) -> tuple[Tensor, Tensor]:
    _check_settings(alpha, beta, temperature, target_temperature, standardize)
    check_student_logits(student_logits)
    batch_size, num_classes = student_logits.shape
    check_other_logits("teacher_logits", teacher_logits, student_logits, f"load a {num_classes}-class teacher")
    check_labels(labels, student_logits.shape)

    target = labels.argmax(-1, keepdim=True) if labels.ndim == 2 else labels.long().unsqueeze(-1)
    dtype = compute_dtype(student_logits)
    student_logits, teacher_logits = student_logits.to(dtype), teacher_logits.detach().to(dtype)
    if standardize:
        student_logits, teacher_logits = (
            standardize_logits(student_logits),
            standardize_logits(teacher_logits, logit_moments),
        )

    answer = teacher_logits.argmax(-1, keepdim=True)
    student_binary = _confidence(student_logits / target_temperature, target)
    teacher_binary = _confidence(teacher_logits / target_temperature, answer)
    confidence_term = F.kl_div(student_binary, teacher_binary.exp(), reduction="sum")

    is_masked = teacher_logits >= teacher_logits.gather(-1, target)
    teacher_rest = (teacher_logits / temperature).masked_fill(is_masked, -math.inf)
    # no class is below the target, or the teacher rules out all that are: a softmax over minus infinity is 0 / 0
    is_empty = teacher_rest.amax(-1, keepdim=True) == -math.inf
    teacher_rest_prob = teacher_rest.softmax(-1).masked_fill(is_empty, 0)
    student_rest = (student_logits / temperature).masked_fill(is_masked & ~is_empty, -math.inf).log_softmax(-1)
    # log 0 where the teacher's probability is 0 too would make 0 * -inf = nan
    student_rest = student_rest.masked_fill(is_masked, 0)
    correlation_term = F.kl_div(student_rest, teacher_rest_prob, reduction="sum")
    return (
        alpha * target_temperature**2 / batch_size * confidence_term,
        beta * temperature**2 / batch_size * correlation_term,
    )


def _confidence(logits: Tensor, index: Tensor) -> Tensor:
    """Log-probabilities [B, 2] of one class of each row and of all the rest."""
    is_index = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, index, True)
    return binary_log_probs(logits, logits.masked_fill(is_index, -math.inf), index)
