"""Computes top-1 and top-5 accuracy, for the Trainer and as an `evaluate` module that needs no network."""

# `evaluate.load` copies only this file into its cache, and reads its imports line by line. So the file imports nothing
# of the package, and each import is on its own line.
import logging

import datasets
import evaluate
import numpy as np
import torch
from transformers import EvalPrediction


def top5_indices(logits: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
    """Returns the classes of the five largest logits, for the Trainer's `preprocess_logits_for_metrics`.

    Args:
        logits: [N, C] float logits.
        labels: not used; the Trainer passes them.

    Returns:
        [N, min(5, C)] int64 class indices, best first; of equal logits, the first class comes first, as with argmax. A row
        with NaN is no prediction: all of its indices are -1, which is no label.

    Raises:
        ValueError: the logits are no [N, C] tensor.

    Example:
        >>> top5_indices(torch.tensor([[0.1, 0.7, 0.2]]))
        tensor([[1, 2, 0]])
    """
    if not isinstance(logits, torch.Tensor) or logits.ndim != 2:
        got = list(logits.shape) if isinstance(logits, torch.Tensor) else f"a {type(logits).__name__}"
        raise ValueError(f"logits must be a tensor [N, C], got {got}: have the model return its logits alone")
    # topk returns the right values, but for equal values any of their indices. A stable sort of all classes would take
    # four times as long.
    values = logits.topk(min(5, logits.shape[1]), dim=1).values
    is_left = torch.ones_like(logits, dtype=torch.bool)
    indices = []
    for value in values.split(1, dim=1):
        index = ((logits == value) & is_left).to(torch.uint8).argmax(dim=1, keepdim=True)
        is_left.scatter_(1, index, False)
        indices.append(index)
    return torch.cat(indices, dim=1).masked_fill(logits.isnan().any(dim=1, keepdim=True), -1)


def compute_metrics(eval_prediction: EvalPrediction) -> dict[str, float]:
    """Computes top-1 and top-5 accuracy, for the Trainer's `compute_metrics`.

    Args:
        eval_prediction: `predictions`, either [N, min(5, C)] int class indices, best first, from `top5_indices`, or
            [N, C] float logits; and `label_ids`, [N] int class indices.

    Returns:
        `{"accuracy": ..., "top5_accuracy": ...}`, fractions as Python floats.

    Rows whose logits are NaN are no prediction and count as wrong; a warning gives their number.

    Raises:
        ValueError: for other shapes, no samples or a negative label.

    Example:
        >>> compute_metrics(EvalPrediction(np.array([[0.1, 0.7, 0.2]]), np.array([1])))
        {'accuracy': 1.0, 'top5_accuracy': 1.0}
    """
    return top1_top5_accuracy(_class_indices(eval_prediction.predictions), eval_prediction.label_ids)


def compute_balanced_metrics(eval_prediction: EvalPrediction) -> dict[str, float]:
    """Computes top-1, top-5 and balanced accuracy, for the Trainer's `compute_metrics` where classes differ in size.

    Args:
        eval_prediction: as in `compute_metrics`.

    Returns:
        The dict of `compute_metrics` with `balanced_accuracy`, the mean over the classes of the fraction of their samples
        whose class comes first. Classes without samples do not count.

    Raises:
        ValueError: as in `compute_metrics`.

    Example:
        >>> compute_balanced_metrics(EvalPrediction(np.array([[0, 1], [0, 1], [0, 1], [0, 1]]), np.array([0, 0, 0, 1])))
        {'accuracy': 0.75, 'top5_accuracy': 1.0, 'balanced_accuracy': 0.5}
    """
    labels = np.asarray(eval_prediction.label_ids)
    predictions = np.asarray(_class_indices(eval_prediction.predictions))
    metrics = top1_top5_accuracy(predictions, labels)
    hits, labels = (predictions[:, 0] == labels)[labels != -100], labels[labels != -100]
    sizes = np.bincount(labels)
    accuracies = np.bincount(labels, weights=hits)[sizes > 0] / sizes[sizes > 0]
    return metrics | {"balanced_accuracy": float(accuracies.mean())}


def _class_indices(predictions: np.ndarray) -> np.ndarray:
    if isinstance(predictions, np.ndarray) and predictions.ndim == 2 and predictions.dtype.kind == "f":
        return top5_indices(torch.from_numpy(predictions)).numpy()
    return predictions


logger = logging.getLogger(__name__)

_DESCRIPTION = "The fraction of samples whose class is the best, or among the five best, of the predicted classes."

_KWARGS_DESCRIPTION = """
Args:
    predictions ([N, K] int): class indices of each sample, best first, with K = min(5, number of classes) or more; only
        the first five count. A row of -1 is no prediction, and counts as wrong.
    references ([N] int): class index of each sample.

Returns:
    accuracy (float): fraction of samples whose class comes first.
    top5_accuracy (float): fraction of samples whose class is among the first five.

Examples:
    >>> from nkd_hf.metrics import TopKAccuracy
    >>> metric = TopKAccuracy()
    >>> metric.compute(predictions=[[2, 0, 1], [1, 2, 0]], references=[2, 0])
    {'accuracy': 0.5, 'top5_accuracy': 1.0}
"""


def top1_top5_accuracy(predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
    """Computes top-1 and top-5 accuracy of ranked predictions.

    Args:
        predictions: [N, K] int class indices, best first, with K = min(5, number of classes) or more; only the first
            five count. A row of only -1, which `top5_indices` returns for logits with NaN, is no prediction: it counts
            as wrong, and a warning gives the number of such rows.
        references: [N] int class indices; samples with -100 are not counted.

    Returns:
        `{"accuracy": ..., "top5_accuracy": ...}`, fractions as Python floats.

    Raises:
        ValueError: for other shapes, no samples, rows that are not different class indices, or a negative label.

    Example:
        >>> top1_top5_accuracy(np.array([[2, 0, 1], [1, 2, 0]]), np.array([2, 0]))
        {'accuracy': 0.5, 'top5_accuracy': 1.0}
    """
    mend = "`nkd_hf.metrics.top5_indices` makes predictions of logits"
    try:
        predictions, references = np.asarray(predictions), np.asarray(references)
    except ValueError as error:
        raise ValueError(f"predictions must list equally many classes for each sample: {mend}") from error
    if predictions.ndim != 2 or references.shape != predictions.shape[:1]:
        raise ValueError(
            "expected predictions [N, K] (class indices, best first) and references [N] (class indices), got "
            f"{list(predictions.shape)} and {list(references.shape)}: {mend}"
        )
    if predictions.size == 0:
        raise ValueError(f"accuracy needs at least one sample, got predictions {list(predictions.shape)}")
    # -100 marks images without a class. The cross-entropy of an evaluation ignores them, too.
    predictions, references = predictions[references != -100], references[references != -100]
    if len(references) == 0:
        raise ValueError(
            "accuracy needs at least one label, got -100 for all samples. Evaluate images of known classes"
        )
    if references.min() < 0:
        raise ValueError(
            f"references must be class indices from 0, got {references.min()}: the split has no labels, as ImageNet's "
            "test split has none; evaluate on the validation split"
        )
    top5 = predictions[:, :5]
    # evaluate truncates floats to integers, so logits may arrive as integers; then some are equal or negative.
    ranked = np.sort(top5, axis=1)
    is_missing = (top5 == -1).all(axis=1)
    wrong = ((ranked[:, 1:] == ranked[:, :-1]).any(axis=1) | (ranked[:, 0] < 0)) & ~is_missing
    if predictions.dtype.kind not in "iu" or wrong.any():
        raise ValueError(
            "each row of predictions must list different class indices (integers), best first, got "
            f"{top5[wrong.argmax()].tolist()}: {mend}"
        )
    if is_missing.any():
        logger.warning(
            "The model predicts nothing for %d of %d samples, since their logits are NaN; they count as wrong.",
            is_missing.sum(),
            len(is_missing),
        )
    hits = top5 == references[:, None]
    return {"accuracy": float(hits[:, 0].mean()), "top5_accuracy": float(hits.any(axis=1).mean())}


class TopKAccuracy(evaluate.Metric):
    """Computes top-1 and top-5 accuracy as an `evaluate.Metric`; `compute`, `add_batch` and `combine` work as for any
    other.

    The rows pass through a file in evaluate's cache, which takes about 0.6 s for ImageNet's 50,000 images. The
    Trainer's `nkd_hf.metrics.compute_metrics` calls `top1_top5_accuracy` on arrays, which takes about 0.01 s.

    Example:
        >>> TopKAccuracy().compute(predictions=[[2, 0, 1], [1, 2, 0]], references=[2, 0])
        {'accuracy': 0.5, 'top5_accuracy': 1.0}
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",  # evaluate wants the argument
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {"predictions": datasets.List(datasets.Value("int64")), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        return top1_top5_accuracy(predictions, references)
