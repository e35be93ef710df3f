"""WTTM: weighted matching of a transformed teacher."""

import torch.nn.functional as F
from torch import Tensor

from .base import DistillationLoss
from .checks import check_other_logits, check_scalar, check_student_logits, compute_dtype


def wttm_loss(student_logits: Tensor, teacher_logits: Tensor, *, exponent: float = 0.2, beta: float = 1.0) -> Tensor:
    r"""Weighted transformed teacher matching of "Knowledge Distillation Based on Transformed Teacher Matching" (ICLR
    2024, https://arxiv.org/abs/2402.11148), section 4.

    The teacher's distribution is smoothed by a power, which is what a temperature of :math:`1 / \gamma` does, and the
    student's is not. An image counts for more, the smoother the teacher's distribution is:

    .. math::
        L_\text{WTTM} = \beta \, U_\gamma(T) \, \text{KL}(T^{(\gamma)} \Vert S), \qquad
        U_\gamma(T) = \sum_j T_j^\gamma, \quad T^{(\gamma)}_i = T_i^\gamma / U_\gamma(T)

    as the mean over the batch, where :math:`T` and :math:`S` are the softmax of teacher and student. Add the student's
    own classification loss to it.

    Args:
        student_logits: [B, C] float logits of the student.
        teacher_logits: [B, C] float logits of the teacher, of any float dtype; they get no gradient.
        exponent: :math:`\gamma`, > 0; the paper's are below 1, and 1 leaves the teacher as it is.
        beta: weight of the loss, >= 0.

    The exponent's default is of the official code's example (github.com/zkxufo/TTM), beta's, 1, the equation's own. The
    weight :math:`U` lies between 1 and :math:`C^{1 - \gamma}`, 250 for 1000 classes at that exponent, so that the loss is
    large where classes are many: the paper chooses both settings for each pair of teacher and student.

    Returns:
        A scalar: float64 for float64 student logits, otherwise float32, in which the arithmetic runs, autocast or not.

    Raises:
        ValueError: shapes or dtypes don't fit, C < 2, B = 0, exponent or beta out of range.
        TypeError: not a tensor.

    Example:
        >>> import torch
        >>> from nkd_hf.losses import wttm_loss
        >>> student_logits = torch.tensor([[1.0, 2.0, 0.5], [0.0, 0.0, 3.0]], requires_grad=True)
        >>> teacher_logits = torch.tensor([[1.0, 4.0, 0.0], [0.5, 0.0, 2.0]])
        >>> loss = wttm_loss(student_logits, teacher_logits)
        >>> loss.backward()
        >>> f"{loss.item():.4f}"
        '0.9088'
    """
    check_scalar("exponent", exponent, positive=True)
    check_scalar("beta", beta)
    check_student_logits(student_logits)
    mend = f"load a {student_logits.shape[1]}-class teacher"
    check_other_logits("teacher_logits", teacher_logits, student_logits, mend)

    dtype = compute_dtype(student_logits)
    powered = exponent * teacher_logits.detach().log_softmax(-1, dtype=dtype)
    weight = powered.logsumexp(-1).exp()
    student_log_prob = student_logits.log_softmax(-1, dtype=dtype)
    divergence = F.kl_div(student_log_prob, powered.softmax(-1), reduction="none").sum(-1)
    return beta * (weight * divergence).mean()


class WTTMLoss(DistillationLoss):
    """[`wttm_loss`] as a module that returns its one component by name.

    Its arguments, and what it raises, are those of [`wttm_loss`].

    Example:
        >>> import torch
        >>> from nkd_hf.losses import WTTMLoss
        >>> distillation_loss = WTTMLoss(exponent=0.1)
        >>> distillation_loss
        WTTMLoss(exponent=0.1, beta=1.0)
        >>> list(distillation_loss(torch.zeros(2, 10), torch.zeros(2, 10)))
        ['wttm']
    """

    name = "WTTM"
    paper = "https://arxiv.org/abs/2402.11148"
    citation = """@inproceedings{zheng2024knowledge,
  title     = {Knowledge Distillation Based on Transformed Teacher Matching},
  author    = {Zheng, Kaixiang and Yang, En-Hui},
  booktitle = {International Conference on Learning Representations (ICLR)},
  year      = {2024}
}"""

    def __init__(self, exponent: float = 0.2, beta: float = 1.0):
        super().__init__()
        check_scalar("exponent", exponent, positive=True)
        check_scalar("beta", beta)
        self.exponent = exponent
        self.beta = beta

    @property
    def soft_temperature(self) -> float:
        """The temperature that the power is; the weight U is of temperature 1, too."""
        return 1 / self.exponent

    def forward(self, student_logits: Tensor, teacher_logits: Tensor) -> dict[str, Tensor]:
        """Returns the weighted component."""
        return {"wttm": wttm_loss(student_logits, teacher_logits, exponent=self.exponent, beta=self.beta)}

    def extra_repr(self) -> str:
        return f"exponent={self.exponent}, beta={self.beta}"
