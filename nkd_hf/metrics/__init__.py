"""Top-1 and top-5 accuracy, for the Trainer and as an `evaluate` module.

`preprocess_logits_for_metrics=top5_indices` cuts the logits to five numbers a sample before they are gathered over the
processes, and `compute_metrics=compute_metrics` scores them:

    >>> import torch
    >>> from transformers import EvalPrediction
    >>> logits, labels = torch.eye(3), torch.tensor([0, 1, 1])
    >>> compute_metrics(EvalPrediction(top5_indices(logits, labels).numpy(), labels.numpy()))
    {'accuracy': 0.6666666666666666, 'top5_accuracy': 1.0}
"""

import numpy as np
import torch
from transformers import EvalPrediction

from .topk_accuracy import TopKAccuracy, top1_top5_accuracy

__all__ = ["TopKAccuracy", "compute_metrics", "top5_indices"]


def top5_indices(logits: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
    """The classes of the five largest logits, for the Trainer's `preprocess_logits_for_metrics`.

    Args:
        logits: [N, C] float logits.
        labels: not used; the Trainer hands them in.

    Returns:
        [N, min(5, C)] int64 class indices, best first; of equal logits, the first class comes first, as with argmax. A row
        with NaN is no prediction: all of its indices are -1, which are nobody's label.

    Raises:
        ValueError: when the logits are no [N, C] tensor.

    Example:
        >>> top5_indices(torch.tensor([[0.1, 0.7, 0.2]]))
        tensor([[1, 2, 0]])
    """
    if not isinstance(logits, torch.Tensor) or logits.ndim != 2:
        got = list(logits.shape) if isinstance(logits, torch.Tensor) else f"a {type(logits).__name__}"
        raise ValueError(f"logits must be a tensor [N, C], got {got}: have the model return its logits alone")
    # topk's values are right, and so is their number, but on a tie its indices are any. A stable sort of all classes would
    # take four times as long.
    values = logits.topk(min(5, logits.shape[1]), dim=1).values
    is_left = torch.ones_like(logits, dtype=torch.bool)
    indices = []
    for value in values.split(1, dim=1):
        index = ((logits == value) & is_left).to(torch.uint8).argmax(dim=1, keepdim=True)
        is_left.scatter_(1, index, False)
        indices.append(index)
    return torch.cat(indices, dim=1).masked_fill(logits.isnan().any(dim=1, keepdim=True), -1)


def compute_metrics(eval_prediction: EvalPrediction) -> dict[str, float]:
    """Top-1 and top-5 accuracy, for the Trainer's `compute_metrics`.

    Args:
        eval_prediction: predictions, either [N, min(5, C)] int class indices, best first, as `top5_indices` makes them,
            or [N, C] float logits, and label_ids, [N] int class indices.

    Returns:
        `{"accuracy": ..., "top5_accuracy": ...}`, fractions as Python floats.

    A warning says how many rows are no prediction, since their logits are NaN; they count as wrong.

    Raises:
        ValueError: for other shapes, no samples or a negative label.

    Example:
        >>> compute_metrics(EvalPrediction(np.array([[0.1, 0.7, 0.2]]), np.array([1])))
        {'accuracy': 1.0, 'top5_accuracy': 1.0}
    """
    predictions = eval_prediction.predictions
    if isinstance(predictions, np.ndarray) and predictions.ndim == 2 and predictions.dtype.kind == "f":
        predictions = top5_indices(torch.from_numpy(predictions)).numpy()
    return top1_top5_accuracy(predictions, eval_prediction.label_ids)
