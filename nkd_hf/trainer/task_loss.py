"""Computes the task loss: the cross-entropy of the student's logits with the labels."""

import torch
import torch.nn.functional as F
from torch import Tensor

# The label of an image without a class, as in torch.nn.functional.cross_entropy.
IGNORE_INDEX = -100


def cross_entropy(
    logits: Tensor, labels: Tensor, label_smoothing: float = 0.0, class_weights: Tensor | None = None
) -> Tensor:
    """Returns the cross-entropy of a batch, a float32 scalar.

    Args:
        logits: [B, C] float.
        labels: [B] integers, of which -100 marks an image without a class, or [B, C] float rows that sum to 1.
        label_smoothing: as in `torch.nn.functional.cross_entropy`.
        class_weights: [C] float, `weight` of `torch.nn.functional.cross_entropy`. The sum over the images is divided
            by the sum of their labels' weights for class indices, and by B for rows.

    Example:
        >>> logits, labels = torch.tensor([[0.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 1])
        >>> cross_entropy(logits, labels, class_weights=torch.tensor([3.0, 1.0]))
        tensor(0.5516)
    """
    targets = labels if labels.is_floating_point() else labels.long()
    # A model in half precision casts its buffers, and the weights are one of them.
    weight = None if class_weights is None else class_weights.float()
    return F.cross_entropy(logits.float(), targets, weight, label_smoothing=label_smoothing)


def read_class_weights(class_weights: Tensor | None, num_labels: int) -> Tensor | None:
    """Returns the weights as float32.

    Raises:
        ValueError: the weights are no tensor [num_labels] of finite numbers >= 0, or all of them are 0.
    """
    if class_weights is None:
        return None
    got = f"{class_weights!r:.60}"
    if isinstance(class_weights, Tensor) and class_weights.shape == (num_labels,):
        weights = class_weights.detach().to(torch.float32, copy=True)
        if weights.isfinite().all() and weights.min() >= 0 and weights.max() > 0:
            return weights
        got = f"weights from {weights.min():g} to {weights.max():g}"
    elif isinstance(class_weights, Tensor):
        got = f"a tensor {list(class_weights.shape)}"
    raise ValueError(
        f"class_weights must be a tensor [{num_labels}] of finite numbers >= 0, not all of them 0, got {got}. Pass one "
        "weight for each class of the student"
    )
