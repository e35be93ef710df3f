"""DIST: relations among the predictions in place of the predictions themselves."""

from torch import Tensor

from .base import DistillationLoss
from .checks import check_other_logits, check_scalar, check_student_logits, compute_dtype


def dist_loss(student_logits: Tensor, teacher_logits: Tensor, *, beta: float = 1.0, gamma: float = 1.0) -> Tensor:
    r"""DIST loss of "Knowledge Distillation from A Stronger Teacher" (NeurIPS 2022, https://arxiv.org/abs/2205.10536),
    equations 8 to 10.

    The student's probabilities need not equal the teacher's, only correlate with them: over the classes of each image, and
    over the images of the batch for each class:

    .. math::
        L_\text{DIST} = \frac\beta B \sum_b \big( 1 - \rho(S_{b,:}, T_{b,:}) \big)
            + \frac\gamma C \sum_i \big( 1 - \rho(S_{:,i}, T_{:,i}) \big)

    where :math:`T` and :math:`S` are the softmax of teacher and student, and :math:`\rho` is Pearson's correlation, taken
    as 0 where one side is constant. The second sum runs over the local batch, so the per-device batch size is part of the
    method; with one image it teaches nothing. Add the student's own classification loss to it.

    Args:
        student_logits: [B, C] float logits of the student.
        teacher_logits: [B, C] float logits of the teacher, of any float dtype; they get no gradient.
        beta: weight of the inter-class relation (within an image), >= 0.
        gamma: weight of the intra-class relation (across images), >= 0.

    The defaults are those of the official code (github.com/hunto/DIST_KD), at whose default temperature, 1, this stays.

    Returns:
        A scalar: float64 for float64 student logits, otherwise float32, in which the arithmetic runs, autocast or not.

    Raises:
        ValueError: shapes or dtypes don't fit, C < 2, B = 0, beta or gamma out of range.
        TypeError: not a tensor.

    Example:
        >>> import torch
        >>> from nkd_hf.losses import dist_loss
        >>> student_logits = torch.tensor([[1.0, 2.0, 0.5], [0.0, 0.0, 3.0]], requires_grad=True)
        >>> teacher_logits = torch.tensor([[1.0, 4.0, 0.0], [0.5, 0.0, 2.0]])
        >>> loss = dist_loss(student_logits, teacher_logits)
        >>> loss.backward()
        >>> f"{loss.item():.4f}"
        '0.6743'
    """
    return sum(_components(student_logits, teacher_logits, beta, gamma))


class DISTLoss(DistillationLoss):
    """[`dist_loss`] as a module that returns its two components by name; their sum is the loss.

    Its arguments, and what it raises, are those of [`dist_loss`].

    Example:
        >>> import torch
        >>> from nkd_hf.losses import DISTLoss
        >>> distillation_loss = DISTLoss(gamma=2.0)
        >>> distillation_loss
        DISTLoss(beta=1.0, gamma=2.0)
        >>> list(distillation_loss(torch.randn(2, 10), torch.randn(2, 10)))
        ['dist_inter_class', 'dist_intra_class']
    """

    name = "DIST"
    paper = "https://arxiv.org/abs/2205.10536"
    citation = """@inproceedings{huang2022knowledge,
  title     = {Knowledge Distillation from A Stronger Teacher},
  author    = {Huang, Tao and You, Shan and Wang, Fei and Qian, Chen and Xu, Chang},
  booktitle = {Advances in Neural Information Processing Systems (NeurIPS)},
  year      = {2022}
}"""
    soft_temperature = 1.0

    def __init__(self, beta: float = 1.0, gamma: float = 1.0):
        super().__init__()
        check_scalar("beta", beta)
        check_scalar("gamma", gamma)
        self.beta = beta
        self.gamma = gamma

    def forward(self, student_logits: Tensor, teacher_logits: Tensor) -> dict[str, Tensor]:
        """Returns the weighted components."""
        inter_class, intra_class = _components(student_logits, teacher_logits, self.beta, self.gamma)
        return {"dist_inter_class": inter_class, "dist_intra_class": intra_class}

    def extra_repr(self) -> str:
        return f"beta={self.beta}, gamma={self.gamma}"


def _components(student_logits: Tensor, teacher_logits: Tensor, beta: float, gamma: float) -> tuple[Tensor, Tensor]:
    check_scalar("beta", beta)
    check_scalar("gamma", gamma)
    check_student_logits(student_logits)
    mend = f"load a {student_logits.shape[1]}-class teacher"
    check_other_logits("teacher_logits", teacher_logits, student_logits, mend)

    dtype = compute_dtype(student_logits)
    student_prob = student_logits.softmax(-1, dtype=dtype)
    teacher_prob = teacher_logits.detach().softmax(-1, dtype=dtype)
    inter_class = 1 - _correlation(student_prob, teacher_prob, dim=1).mean()
    intra_class = 1 - _correlation(student_prob, teacher_prob, dim=0).mean()
    return beta * inter_class, gamma * intra_class


def _correlation(first: Tensor, second: Tensor, dim: int) -> Tensor:
    """Pearson's correlation along a dimension."""
    first = first - first.mean(dim, keepdim=True)
    second = second - second.mean(dim, keepdim=True)
    # As in the official code, the floor is added; that of F.cosine_similarity is another one.
    return (first * second).sum(dim) / (first.norm(dim=dim) * second.norm(dim=dim) + 1e-8)
