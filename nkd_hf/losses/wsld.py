"""WSLD: weighted soft labels."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import DistillationLoss
from .checks import check_labels, check_other_logits, check_scalar, check_student_logits, compute_dtype


def wsld_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    alpha: float = 2.25,
    temperature: float = 4.0,
) -> Tensor:
    r"""Weighted soft labels of "Rethinking Soft Labels for Knowledge Distillation: A Bias-Variance Tradeoff Perspective"
    (ICLR 2021, https://arxiv.org/abs/2102.00650), section 4.

    KD's soft labels count for less in images that the student knows better than the teacher:

    .. math::
        L_\text{WSLD} = -\alpha \tau^2 \Big( 1 - \exp \frac{-\log S_t}{\log T_t} \Big)
            \sum_i T^\tau_i \log S^\tau_i

    as the mean over the batch, where :math:`T` and :math:`S` are the softmax of teacher and student, :math:`t` the target
    and :math:`\cdot^\tau` marks the softmax at temperature :math:`\tau`. The weight, whose exponent is the ratio of the
    two cross-entropies, carries no gradient. Add the student's own classification loss to it.

    Args:
        student_logits: [B, C] float logits of the student.
        teacher_logits: [B, C] float logits of the teacher, of any float dtype; they get no gradient.
        labels: [B] integer classes, or [B, C] float mixup / cutmix labels, whose heaviest class is the target.
        alpha: weight of the loss, >= 0.
        temperature: :math:`\tau` of the soft labels, > 0.

    The defaults are those of github.com/yzd-v/cls_KD.
    Differs from cls_KD: mixup labels are taken (there they are an error), in NKD's way.

    Returns:
        A scalar: float64 for float64 student logits, otherwise float32, in which the arithmetic runs, autocast or not.

    Raises:
        ValueError: shapes or dtypes don't fit, C < 2, B = 0, alpha or temperature out of range, or labels that are
            outside 0..C-1 or rows that don't sum to one (looked at on the CPU only, since a GPU would have to wait).
        TypeError: not a tensor.

    Example:
        >>> import torch
        >>> from nkd_hf.losses import wsld_loss
        >>> student_logits = torch.tensor([[1.0, 2.0, 0.5], [0.0, 0.0, 3.0]], requires_grad=True)
        >>> teacher_logits = torch.tensor([[1.0, 4.0, 0.0], [0.5, 0.0, 2.0]])
        >>> loss = wsld_loss(student_logits, teacher_logits, torch.tensor([1, 2]))
        >>> loss.backward()
        >>> f"{loss.item():.4f}"
        '23.9543'
    """
    check_scalar("alpha", alpha)
    check_scalar("temperature", temperature, positive=True)
    check_student_logits(student_logits)
    mend = f"load a {student_logits.shape[1]}-class teacher"
    check_other_logits("teacher_logits", teacher_logits, student_logits, mend)
    check_labels(labels, student_logits.shape)

    target = labels.argmax(-1) if labels.ndim == 2 else labels.long()
    dtype = compute_dtype(student_logits)
    student_logits, teacher_logits = student_logits.to(dtype), teacher_logits.detach().to(dtype)
    with torch.no_grad():
        student_error = F.cross_entropy(student_logits, target, reduction="none")
        teacher_error = F.cross_entropy(teacher_logits, target, reduction="none")
        weight = -torch.expm1(-student_error / (teacher_error + 1e-7))
    teacher_prob = (teacher_logits / temperature).softmax(-1)
    student_log_prob = (student_logits / temperature).log_softmax(-1)
    cross_entropy = -(teacher_prob * student_log_prob).sum(-1)
    return alpha * temperature**2 * (weight * cross_entropy).mean()


class WSLDLoss(DistillationLoss):
    """[`wsld_loss`] as a module that returns its one component by name.

    Its arguments, and what it raises, are those of [`wsld_loss`].

    Example:
        >>> import torch
        >>> from nkd_hf.losses import WSLDLoss
        >>> distillation_loss = WSLDLoss(alpha=2.5, temperature=2.0)
        >>> distillation_loss
        WSLDLoss(alpha=2.5, temperature=2.0)
        >>> list(distillation_loss(torch.zeros(2, 10), torch.zeros(2, 10), torch.tensor([3, 7])))
        ['wsld']
    """

    name = "WSLD"
    paper = "https://arxiv.org/abs/2102.00650"
    citation = """@inproceedings{zhou2021rethinking,
  title     = {Rethinking Soft Labels for Knowledge Distillation: A Bias-Variance Tradeoff Perspective},
  author    = {Zhou, Helong and Song, Liangchen and Chen, Jiajie and Zhou, Ye and Wang, Guoli and Yuan, Junsong and Zhang, Qian},
  booktitle = {International Conference on Learning Representations (ICLR)},
  year      = {2021}
}"""

    def __init__(self, alpha: float = 2.25, temperature: float = 4.0):
        super().__init__()
        check_scalar("alpha", alpha)
        check_scalar("temperature", temperature, positive=True)
        self.alpha = alpha
        self.temperature = temperature

    @property
    def soft_temperature(self) -> float:
        """The temperature of the soft labels; the weight is of temperature 1."""
        return self.temperature

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Returns the weighted component."""
        loss = wsld_loss(student_logits, teacher_logits, labels, alpha=self.alpha, temperature=self.temperature)
        return {"wsld": loss}

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, temperature={self.temperature}"
