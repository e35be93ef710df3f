"""KD: the classic knowledge distillation, soft labels at a raised temperature."""

from torch import Tensor

from .base import DistillationLoss
from .checks import check_flag, check_other_logits, check_scalar, check_share, check_student_logits, compute_dtype
from .standardized import describe_standardize, standardize_logits


def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    alpha: float = 0.5,
    temperature: float = 4.0,
    standardize: bool = False,
    logit_moments: Tensor | None = None,
) -> Tensor:
    r"""Knowledge distillation loss of "Distilling the Knowledge in a Neural Network" (https://arxiv.org/abs/1503.02531),
    section 2.

    .. math::
        L_\text{KD} = -\alpha \tau^2 \sum_i T^\tau_i \log S^\tau_i

    as the mean over the batch, where :math:`T^\tau` and :math:`S^\tau` are the softmax of teacher and student at
    temperature :math:`\tau`. It is a cross-entropy: at its least it is the teacher's entropy, not zero. Add the student's
    own classification loss to it, times :math:`1 - \alpha`; the trainer does so with [`KDLoss`].

    Args:
        student_logits: [B, C] float logits of the student.
        teacher_logits: [B, C] float logits of the teacher, of any float dtype; they get no gradient.
        alpha: weight of the term, 0 <= alpha <= 1.
        temperature: :math:`\tau`, > 0.
        standardize: whether the logits of both are standardised first, see [`standardize_logits`]. Its official code has
            temperature 2 and a weight of 9 beside 0.1 for the task loss on CIFAR-100, the ratio of `alpha` 0.989.
        logit_moments: [B, 2] mean and unbiased standard deviation of the teacher's logits, for `standardize` where some of
            `teacher_logits` are approximations; None computes them.

    The defaults are those of github.com/yzd-v/cls_KD.

    Returns:
        A scalar: float64 for float64 student logits, otherwise float32, in which the arithmetic runs, autocast or not.
        Not finite with `standardize` where the teacher masks a class with -inf.

    Raises:
        ValueError: shapes or dtypes don't fit, C < 2, B = 0, alpha or temperature out of range, standardize no bool.
        TypeError: not a tensor.

    Example:
        >>> import torch
        >>> from nkd_hf.losses import kd_loss
        >>> student_logits = torch.tensor([[1.0, 2.0, 0.5], [0.0, 0.0, 3.0]], requires_grad=True)
        >>> teacher_logits = torch.tensor([[1.0, 4.0, 0.0], [0.5, 0.0, 2.0]])
        >>> loss = kd_loss(student_logits, teacher_logits)
        >>> loss.backward()
        >>> f"{loss.item():.4f}"
        '8.5197'
    """
    check_share("alpha", alpha)
    check_scalar("temperature", temperature, positive=True)
    check_flag("standardize", standardize)
    check_student_logits(student_logits)
    mend = f"load a {student_logits.shape[1]}-class teacher"
    check_other_logits("teacher_logits", teacher_logits, student_logits, mend)

    dtype = compute_dtype(student_logits)
    student_logits, teacher_logits = student_logits.to(dtype), teacher_logits.detach().to(dtype)
    if standardize:
        student_logits, teacher_logits = (
            standardize_logits(student_logits),
            standardize_logits(teacher_logits, logit_moments),
        )
    teacher_prob = (teacher_logits / temperature).softmax(-1)
    student_log_prob = (student_logits / temperature).log_softmax(-1)
    cross_entropy = -(teacher_prob * student_log_prob).sum(-1).mean()
    return alpha * temperature**2 * cross_entropy


class KDLoss(DistillationLoss):
    """[`kd_loss`] as a module that returns its one component by name.

    Its arguments, and what it raises, are those of [`kd_loss`]. `1 - alpha` is its `task_weight`, with which the trainer
    multiplies the task loss, whatever other losses are added to this one.

    Example:
        >>> import torch
        >>> from nkd_hf.losses import KDLoss
        >>> distillation_loss = KDLoss(alpha=0.9)
        >>> distillation_loss
        KDLoss(alpha=0.9, temperature=4.0)
        >>> f"{distillation_loss.task_weight:.1f}"
        '0.1'
        >>> list(distillation_loss(torch.zeros(2, 10), torch.zeros(2, 10)))
        ['kd']
    """

    name = "KD"
    paper = "https://arxiv.org/abs/1503.02531"
    citation = """@article{hinton2015distilling,
  title   = {Distilling the Knowledge in a Neural Network},
  author  = {Hinton, Geoffrey and Vinyals, Oriol and Dean, Jeff},
  journal = {arXiv preprint arXiv:1503.02531},
  year    = {2015}
}"""

    def __init__(self, alpha: float = 0.5, temperature: float = 4.0, standardize: bool = False):
        super().__init__()
        check_share("alpha", alpha)
        check_scalar("temperature", temperature, positive=True)
        check_flag("standardize", standardize)
        self.alpha = alpha
        self.temperature = temperature
        self.standardize = standardize

    @property
    def task_weight(self) -> float:
        """What the task loss is multiplied with."""
        return 1 - self.alpha

    @property
    def soft_temperature(self) -> float:
        """The temperature of the teacher's softmax."""
        return self.temperature

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, logit_moments: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Returns the weighted component."""
        loss = kd_loss(
            student_logits,
            teacher_logits,
            alpha=self.alpha,
            temperature=self.temperature,
            standardize=self.standardize,
            logit_moments=logit_moments,
        )
        return {"kd": loss}

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, temperature={self.temperature}{describe_standardize(self.standardize)}"
