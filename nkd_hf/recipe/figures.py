"""Computes the figures of a run's report from logits and labels: accuracy, calibration, disagreements, likely label errors.

All functions take NumPy arrays: logits are [N, C] floats, labels are [N] integers. Images with the label -100 have no class and
are ignored. A row of logits with NaN is no prediction: it counts as wrong, and it agrees with nothing.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ..metrics import top1_top5_accuracy, top5_indices
from .calibration import (
    NO_CLASS,
    calibration_error,
    check_logits,
    confidences,
    fit_temperature,
    predictions,
    reliability,
    shifted_logits,
    with_class,
)

__all__ = [
    "accuracy_difference",
    "agreement",
    "confused_pairs",
    "confusion",
    "disagreements",
    "fit_temperature",
    "likely_label_errors",
    "model_figures",
    "per_class",
    "unique_names",
]


def model_figures(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Computes the accuracies and the calibration error of a model.

    Args:
        logits: [N, C] float logits.
        labels: [N] integer classes.

    Returns:
        Fractions, rounded to four digits: `top1`; `top5` for six classes or more; `balanced_accuracy`, the mean of the classes'
        accuracies, without classes that have no image; `ece`, the expected calibration error of "On Calibration of Modern Neural
        Networks" (ICML 2017, https://arxiv.org/abs/1706.04599) with 15 bins of equal width.

    Raises:
        ValueError: the shapes do not fit, or no image has a class.

    Example:

    ```python
    >>> import numpy as np
    >>> from nkd_hf.recipe.figures import model_figures
    >>> model_figures(np.log([[0.7, 0.3], [0.9, 0.1], [0.2, 0.8]]), np.array([0, 1, 1]))
    {'top1': 0.6667, 'balanced_accuracy': 0.75, 'ece': 0.4667}

    ```
    """
    check_logits(logits, labels)
    accuracy = top1_top5_accuracy(top5_indices(torch.from_numpy(np.ascontiguousarray(logits))).numpy(), labels)
    hits, support = _hits_by_class(logits, labels)
    figures = {
        "top1": accuracy["accuracy"],
        "top5": accuracy["top5_accuracy"],
        "balanced_accuracy": np.mean(hits[support > 0] / support[support > 0]),
        "ece": calibration_error(reliability(logits, labels)),
    }
    if logits.shape[1] < 6:
        del figures["top5"]
    return {name: round(float(value), 4) for name, value in figures.items()}


def accuracy_difference(logits: np.ndarray, other: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Compares the top-1 accuracies of two models on the same images.

    Args:
        logits: [N, C] float logits of a model.
        other: [N, C] float logits of the model that it is compared with.
        labels: [N] integer classes.

    Returns:
        The difference, positive if the first model is better, and half the width of its 95% confidence interval: the normal
        approximation for paired samples with the continuity correction. Without the correction, a few images would
        seem to prove a difference. Both are fractions, rounded to four digits.

    Example:

    ```python
    >>> import numpy as np
    >>> from nkd_hf.recipe.figures import accuracy_difference
    >>> good, bad = np.array([[1.0, 0.0], [0.0, 1.0]] * 50), np.array([[1.0, 0.0], [1.0, 0.0]] * 50)
    >>> accuracy_difference(good, bad, np.array([0, 1] * 50))
    (0.5, 0.108)

    ```
    """
    labels, logits, other = with_class(labels, logits, other)
    differences = (predictions(logits) == labels).astype(float) - (predictions(other) == labels)
    margin = 1.96 * differences.std() / len(differences) ** 0.5 + 1 / len(differences)
    return round(float(differences.mean()), 4), round(float(margin), 4)


def unique_names(class_names: Sequence[str]) -> list[str]:
    """Adds the class's number to each name that several classes have, such as the two cranes of ImageNet.

    Example:

    ```python
    >>> from nkd_hf.recipe.figures import unique_names
    >>> unique_names(["crane", "hen", "crane"])
    ['crane (class 0)', 'hen', 'crane (class 2)']

    ```
    """
    count = Counter(class_names)
    return [f"{name} (class {number})" if count[name] > 1 else name for number, name in enumerate(class_names)]


def per_class(
    logits: Mapping[str, np.ndarray], labels: np.ndarray, class_names: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Computes the accuracies of several models for each class.

    Args:
        logits: [N, C] float logits by the model's name.
        labels: [N] integer classes.
        class_names: C names; see [`unique_names`].

    Returns:
        By the class's name: `support`, its number of images, and the accuracy of each model, a fraction rounded to four digits,
        None for a class without images.

    Example:

    ```python
    >>> import numpy as np
    >>> from nkd_hf.recipe.figures import per_class
    >>> per_class({"student": np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])}, np.array([0, 0, 0]), ["cat", "dog"])
    {'cat': {'support': 3, 'student': 0.6667}, 'dog': {'support': 0, 'student': None}}

    ```
    """
    by_model = {}
    for name, values in logits.items():
        check_logits(values, labels)
        hits, support = _hits_by_class(values, labels)
        by_model[name] = [round(int(h) / int(n), 4) if n else None for h, n in zip(hits, support, strict=True)]
    return {
        class_name: {"support": int(support[number])} | {name: values[number] for name, values in by_model.items()}
        for number, class_name in enumerate(unique_names(class_names))
    }


def agreement(logits: np.ndarray, other: np.ndarray) -> float:
    """Returns the fraction of images for which two models predict the same class, rounded to four digits.

    Args:
        logits: [N, C] float logits of a model.
        other: [N, C] float logits of another model.
    """
    own, others = predictions(logits), predictions(other)
    return round(float(np.mean((own == others) & (own >= 0))), 4)


def confused_pairs(logits: np.ndarray, labels: np.ndarray, limit: int) -> list[tuple[int, int, int]]:
    """Returns the most frequent wrong predictions as (label, prediction, number of images), the most frequent first."""
    labels, logits = with_class(labels, logits)
    predicted = predictions(logits)
    is_wrong = (predicted != labels) & (predicted >= 0)
    pairs = Counter(zip(labels[is_wrong].tolist(), predicted[is_wrong].tolist(), strict=True))
    return [(*pair, count) for pair, count in sorted(pairs.items(), key=lambda entry: (-entry[1], entry[0]))[:limit]]


def confusion(logits: np.ndarray, labels: np.ndarray, classes: Sequence[int] | None = None) -> np.ndarray:
    """Counts the predictions for each class.

    Args:
        logits: [N, C] float logits.
        labels: [N] integer classes.
        classes: K classes to count; all C by default.

    Returns:
        [K, K] int64: rows are labels, columns are predictions, both in the order of `classes`. Rows with NaN, and other classes,
        are in no cell.
    """
    labels, logits = with_class(labels, logits)
    classes = np.arange(logits.shape[1]) if classes is None else np.asarray(classes)
    place = np.full(logits.shape[1] + 1, -1)  # the last entry is the place of the prediction -1
    place[classes] = np.arange(len(classes))
    rows, columns = place[labels], place[predictions(logits)]
    is_counted = (rows >= 0) & (columns >= 0)
    cells = np.bincount(rows[is_counted] * len(classes) + columns[is_counted], minlength=len(classes) ** 2)
    return cells.reshape(len(classes), len(classes))


def disagreements(teacher: np.ndarray, student: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Finds the images for which two models predict different classes.

    Args:
        teacher: [N, C] float logits.
        student: [N, C] float logits.
        labels: [N] integer classes.

    Returns:
        [M] int64 numbers of images. First come the images for which the less sure model is surest.
    """
    theirs, own = predictions(teacher), predictions(student)
    found = np.flatnonzero((theirs != own) & (theirs >= 0) & (own >= 0) & (labels != NO_CLASS))
    return found[np.argsort(-_lower_confidence(teacher[found], student[found]), kind="stable")]


def likely_label_errors(teacher: np.ndarray, student: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Finds images whose label is probably wrong: two models confidently predict the same other class.

    A model is confident of a class if the class's probability is at least its mean over the images with this label, as
    in "Confident Learning" (JAIR 2021, https://arxiv.org/abs/1911.00068). The threshold fits models of any certainty.

    Args:
        teacher: [N, C] float logits.
        student: [N, C] float logits.
        labels: [N] integer classes.

    Returns:
        [M] int64 numbers of images. First come the images for which the less sure model is surest.
    """
    predicted = predictions(teacher)
    is_suspect = (predicted == predictions(student)) & (predicted >= 0) & (predicted != labels) & (labels != NO_CLASS)
    for logits in (teacher, student):
        # 1e-6 is above the rounding errors of float32: a model may be equally sure of all images of a class.
        is_suspect &= confidences(logits) >= _mean_probability(logits, labels)[predicted] - 1e-6
    found = np.flatnonzero(is_suspect)
    return found[np.argsort(-_lower_confidence(teacher[found], student[found]), kind="stable")]


def _mean_probability(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Computes each class's mean probability over the images with its label, [C]; infinite without images."""
    is_used = (labels != NO_CLASS) & ~np.isnan(logits).any(axis=1)
    labels, logits = labels[is_used], logits[is_used]
    own = np.exp(shifted_logits(logits)[np.arange(len(labels)), labels]) * confidences(logits)
    count = np.bincount(labels, minlength=logits.shape[1])
    sums = np.bincount(labels, weights=own, minlength=logits.shape[1])
    return np.where(count > 0, sums / np.maximum(count, 1), np.inf)


def _lower_confidence(teacher: np.ndarray, student: np.ndarray) -> np.ndarray:
    return np.minimum(confidences(teacher), confidences(student))


def _hits_by_class(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    labels, logits = with_class(labels, logits)
    hits = np.bincount(labels[predictions(logits) == labels], minlength=logits.shape[1])
    return hits, np.bincount(labels, minlength=logits.shape[1])
