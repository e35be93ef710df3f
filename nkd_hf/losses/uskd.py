"""USKD: universal self-knowledge distillation, with soft labels that the student makes for itself."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import DistillationLoss
from .checks import (
    check_count,
    check_labels,
    check_other_logits,
    check_scalar,
    check_student_logits,
    check_tensor,
    compute_dtype,
)
from .nkd import NKDLoss
from .normalized import normalized_loss


def uskd_loss(
    mid_logits: Tensor,
    student_logits: Tensor,
    labels: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 0.1,
    mu: float = 0.005,
) -> Tensor:
    r"""Universal self-knowledge distillation loss of "From Knowledge Distillation to Self-Knowledge Distillation: A Unified
    Approach with Normalized Loss and Customized Soft Labels" (ICCV 2023, https://arxiv.org/abs/2303.13005).

    There is no teacher. An auxiliary head on a mid-layer feature, trained by a weak cross-entropy, helps to rank the
    classes, and the rank sets the soft labels of the non-target classes by Zipf's law:

    .. math::
        L_\text{USKD} = -\alpha P_t \log S_t
            - \beta \sum_{i \ne t} Z_i \log \mathcal N(S)_i
            - \mu \sum_i V_i \log W_i

    as the mean over the batch, where :math:`S` and :math:`W` are the softmax of student and auxiliary head,
    :math:`\mathcal N(S)` the student's softmax without the target class, and :math:`V` the label :math:`Y` smoothed by
    0.1. :math:`P_t = S_t^2 + Y_t - \overline{S_t^2}`, with the mean over the local batch, so that the per-device batch
    size is part of the method. :math:`Z_i` is in proportion to one over the place of class :math:`i` in the rank of all
    classes. Mixup labels have two targets, each with its weight. :math:`P`, :math:`Z` and the rank carry no gradient.
    Add the student's own classification loss to it.

    Args:
        mid_logits: [B, C] float logits of the auxiliary head; the weak term alone sends them a gradient.
        student_logits: [B, C] float logits of the student.
        labels: [B] integer classes, or [B, C] float mixup / cutmix labels, whose two heaviest classes are the targets; a
            row with a single non-zero entry counts as a class index.
        alpha: weight of the target term, >= 0.
        beta: weight of the non-target term, >= 0.
        mu: weight of the weak term, >= 0.

    The defaults are the paper's for ImageNet; it has alpha 0.1, beta 0.1 and mu 0.1 on CIFAR-100.

    Returns:
        A scalar: float64 for float64 student logits, otherwise float32, in which the arithmetic runs, autocast or not.
        Its gradient with respect to `student_logits` has their dtype and can't be differentiated again
        (`create_graph=True` is a RuntimeError).

    Raises:
        ValueError: shapes or dtypes don't fit, C < 2, B = 0, alpha, beta or mu out of range, or labels that are outside
            0..C-1 or rows that don't sum to one (looked at on the CPU only, since a GPU would have to wait).
        TypeError: not a tensor.

    Example:
        >>> import torch
        >>> from nkd_hf.losses import uskd_loss
        >>> mid_logits = torch.tensor([[0.5, 1.0, 0.2], [0.1, 0.3, 0.9]], requires_grad=True)
        >>> student_logits = torch.tensor([[1.0, 2.0, 0.5], [0.0, 0.0, 3.0]], requires_grad=True)
        >>> loss = uskd_loss(mid_logits, student_logits, torch.tensor([1, 2]))
        >>> loss.backward()
        >>> f"{loss.item():.4f}"
        '0.3119'
    """
    return sum(_components(mid_logits, student_logits, labels, alpha, beta, mu)[:3])


class USKDLoss(DistillationLoss):
    """[`uskd_loss`] with its auxiliary head, as a module that returns its three components by name; their sum is the loss.

    The head's parameters (and those of `feature_norm`) train with the student and are dropped with the loss. `alpha`, `beta`
    and `mu` are those of [`uskd_loss`].

    Args:
        in_features: D, channels of the mid-layer feature.
        num_classes: C, classes of the student.
        feature_norm: applied to the feature before it is averaged over its positions, e.g. `nn.LayerNorm(384)` for
            Swin-T, whose official backbone ends each stage with one while timm's doesn't.

    Raises:
        ValueError: a count or a weight out of range; from the call, a feature that doesn't fit and what `uskd_loss` raises.

    Example:
        >>> import torch
        >>> from nkd_hf.losses import USKDLoss
        >>> distillation_loss = USKDLoss(in_features=16, num_classes=10)
        >>> distillation_loss
        USKDLoss(
          alpha=1.0, beta=0.1, mu=0.005
          (head): Linear(in_features=16, out_features=10, bias=True)
        )
        >>> components = distillation_loss(torch.randn(4, 7, 7, 16), torch.randn(4, 10), torch.tensor([0, 3, 5, 9]))
        >>> list(components)
        ['uskd_target', 'uskd_non_target', 'uskd_weak']
    """

    name = "USKD"
    paper = NKDLoss.paper
    citation = NKDLoss.citation

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        alpha: float = 1.0,
        beta: float = 0.1,
        mu: float = 0.005,
        feature_norm: nn.Module | None = None,
    ):
        super().__init__()
        check_count("in_features", in_features, 1, "count the mid feature's channels")
        check_count("num_classes", num_classes, 2, "count the student's classes")
        check_scalar("alpha", alpha)
        check_scalar("beta", beta)
        check_scalar("mu", mu)
        self.alpha = alpha
        self.beta = beta
        self.mu = mu
        self.feature_norm = feature_norm
        self.head = nn.Linear(in_features, num_classes)

    def forward(
        self, mid_feature: Tensor, student_logits: Tensor, labels: Tensor, label_smoothing: float | None = None
    ) -> dict[str, Tensor]:
        """Returns the weighted components; a `label_smoothing` asks for the task loss too, see [`DistillationLoss`].

        Args:
            mid_feature: [B, D] float, or, channels last, [B, ..., D] tokens or pixels, which are averaged. The paper takes a
                CNN's last stage but one, averaged, and a ViT's class token after the middle block; a ViT whose classifier
                does not read a class token gives the mean of its patch tokens there.
            student_logits: as in [`uskd_loss`].
            labels: as in [`uskd_loss`].
            label_smoothing: of the task loss.
        """
        self._check_mid_feature(mid_feature, student_logits)
        if self.feature_norm is not None:
            mid_feature = self.feature_norm(mid_feature)
        if mid_feature.ndim > 2:
            mid_feature = mid_feature.flatten(1, -2).mean(1)
        mid_logits = self.head(mid_feature.to(self.head.weight.dtype))
        target_term, non_target_term, weak_term, task_loss = _components(
            mid_logits, student_logits, labels, self.alpha, self.beta, self.mu, label_smoothing
        )
        components = {"uskd_target": target_term, "uskd_non_target": non_target_term, "uskd_weak": weak_term}
        return components if task_loss is None else {"task": task_loss, **components}

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, beta={self.beta}, mu={self.mu}"

    def _check_mid_feature(self, mid_feature: Tensor, student_logits: Tensor) -> None:
        check_student_logits(student_logits)
        check_tensor("mid_feature", mid_feature)
        batch_size, in_features = student_logits.shape[0], self.head.in_features
        shape = list(mid_feature.shape)
        if len(shape) < 2 or shape[0] != batch_size or shape[-1] != in_features or 0 in shape:
            if len(shape) < 2 or 0 in shape:
                mend = "pass at least one row per image"
            elif shape[0] != batch_size:
                mend = "pass the feature of the same batch"
            elif len(shape) > 2 and shape[1] == in_features:
                mend = "move the channels last, or average over the positions"
            else:
                mend = f"make USKDLoss with in_features={shape[-1]}"
            raise ValueError(
                f"mid_feature must be [{batch_size}, {in_features}] or channels last [{batch_size}, ..., {in_features}], "
                f"got {shape}: {mend}"
            )
        if not mid_feature.is_floating_point():
            raise ValueError(f"mid_feature must be of a float dtype, got {mid_feature.dtype}: pass a layer's output")


def _components(
    mid_logits: Tensor,
    student_logits: Tensor,
    labels: Tensor,
    alpha: float,
    beta: float,
    mu: float,
    label_smoothing: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    check_scalar("alpha", alpha)
    check_scalar("beta", beta)
    check_scalar("mu", mu)
    check_student_logits(student_logits)
    num_classes = student_logits.shape[1]
    check_other_logits("mid_logits", mid_logits, student_logits, f"give the auxiliary head num_classes={num_classes}")
    check_labels(labels, student_logits.shape)

    dtype = compute_dtype(student_logits)
    labels = labels.to(dtype) if labels.ndim == 2 else labels.long()
    with torch.no_grad():
        target, target_value = _targets(labels, dtype)
        target_label, non_target_label = _soft_labels(
            mid_logits.to(dtype), student_logits.to(dtype), target, target_value
        )
    weak_term = F.cross_entropy(mid_logits.to(dtype), labels, label_smoothing=0.1)
    task = {} if label_smoothing is None else {"task_labels": labels, "label_smoothing": label_smoothing}
    target_term, non_target_term, task_loss = normalized_loss(
        student_logits, target, target_label, non_target_label, **task
    )
    return alpha * target_term, beta * non_target_term, mu * weak_term, task_loss


def _targets(labels: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Target classes and their share of the label, both [B, K]: K is 1 for class indices and 2 for mixup labels."""
    if labels.ndim == 1:
        target = labels.unsqueeze(-1)
        return target, torch.ones_like(target, dtype=dtype)
    value, target = labels.topk(2, dim=-1)
    # Differs from cls_KD: a row with one non-zero entry (mixup of two images of one class) has one target. There an
    # arbitrary class of weight zero becomes its second target, is missing from the non-target term and shifts the mean.
    target = torch.where(value > 0, target, target[:, :1])
    return target, value


def _soft_labels(
    mid_logits: Tensor, student_logits: Tensor, target: Tensor, target_value: Tensor
) -> tuple[Tensor, Tensor]:
    """Soft labels [B, K] of the targets and [B, C] of the other classes."""
    log_prob = student_logits.log_softmax(-1)
    target_log_prob = log_prob.gather(-1, target)
    is_target = target_value > 0
    squared_prob = (2 * target_log_prob).exp() * is_target
    target_label = (squared_prob + target_value - squared_prob.mean(0)) * is_target

    # As in cls_KD, the rank adds the auxiliary head's probabilities and the student's *log*-probabilities. One expects
    # probabilities in both; but there the variable that held the student's softmax holds its log-softmax by the time of
    # the rank, and the official values are reproduced with this rank only.
    mid_prob = mid_logits.softmax(-1)
    mid_target_prob = (mid_prob.gather(-1, target) * is_target).sum(-1, keepdim=True)
    target_log_prob = (target_log_prob * is_target).sum(-1, keepdim=True)
    rank = mid_prob.div_(1 - mid_target_prob + 1e-6).addcdiv_(log_prob, 1 - target_log_prob + 1e-6)
    del log_prob  # the sort takes three such matrices
    order = _descending_order(rank)

    # Zipf's law, by the place among all classes: the gap that a target leaves stays
    zipf = 1 / torch.arange(1, rank.shape[-1] + 1, dtype=rank.dtype, device=rank.device)
    non_target_label = torch.empty_like(rank).scatter_(-1, order, zipf.expand_as(order)).scatter_(-1, target, 0)
    # with two classes and both of them targets nothing is left to normalise
    total = non_target_label.sum(-1, keepdim=True).clamp_min(torch.finfo(rank.dtype).tiny)
    return target_label, non_target_label.div_(total)


def _descending_order(rank: Tensor) -> Tensor:
    """The classes [B, C] of each row from the highest rank to the lowest, the lower class first among equals.

    The values of `rank` are overwritten.
    """
    bits = _sortable_bits(rank)
    if bits.dtype != torch.int32 or bits.device.type != "cpu":
        return bits.argsort(dim=-1, descending=True, stable=True)
    # rank in the upper half of an integer, class in the lower
    keys = bits.bitwise_not_().long().bitwise_left_shift_(32).bitwise_or_(torch.arange(rank.shape[-1]))
    _sort_rows(keys)
    return keys.bitwise_and_(2**32 - 1)


# An operator of its own, so that torch.compile takes it into its graph as it is.
@torch.library.custom_op("nkd_hf::sort_rows", mutates_args=("keys",), device_types="cpu")
def _sort_rows(keys: Tensor) -> None:
    """Sorts each row of [B, C] int64 in place, a multiple faster than `torch.sort`, which moves indices along."""
    keys.numpy().sort()


def _sortable_bits(values: Tensor) -> Tensor:
    """Integers in the order of float32 or float64 values, made in their place: they sort a third faster on the CPU."""
    bits = values.view(torch.int32 if values.dtype == torch.float32 else torch.int64)
    # the bits of floats order like integers, those of negative floats the other way round
    info = torch.iinfo(bits.dtype)
    return bits.bitwise_xor_((bits >> (info.bits - 1)) & info.max)
