"""Reads predictions and their confidence from logits, and fits a temperature to them.

Logits are [N, C] floats, labels are [N] integers. Images with the label -100 have no class and are ignored. A row of logits
with NaN is no prediction: it counts as wrong.
"""

import numpy as np

_BINS = 15
NO_CLASS = -100
# Limits of the search for a temperature: with no wrong prediction, or with random labels, the best one is 0 or
# infinite.
_TEMPERATURES = (0.05, 20.0)
# Each step halves an interval of the logarithm, whose width is 6 at first: the result has five correct digits.
_SEARCH_STEPS = 20


def predictions(logits: np.ndarray) -> np.ndarray:
    """Returns the class of each row's largest logit, [N] int64: the first one of equal logits, and -1 for a row with NaN."""
    return np.where(np.isnan(logits).any(axis=1), -1, logits.argmax(axis=1))


def confidences(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Returns the probability of each row's prediction, [N] float64, in softmax(logits / temperature); 0 for NaN."""
    with np.errstate(invalid="ignore"):
        probabilities = 1 / np.exp(shifted_logits(logits) / temperature).sum(axis=1, dtype=np.float64)
    return np.nan_to_num(probabilities)


def reliability(
    logits: np.ndarray, labels: np.ndarray, temperature: float = 1.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Groups images into 15 bins of equal width by the confidence of their prediction.

    Args:
        logits: [N, C] float logits.
        labels: [N] integer classes.
        temperature: the logits are divided by it.

    Returns:
        Three arrays [15]: the number of images, their mean confidence, and the fraction of right predictions. The last two
        are 0 in an empty bin.
    """
    labels, logits = with_class(labels, logits)
    confidence = confidences(logits, temperature)
    # A bin contains its upper limit, as in Guo et al. The small number is above the rounding errors of float32.
    bins = np.clip(np.ceil(confidence * _BINS - 1e-6).astype(int) - 1, 0, _BINS - 1)
    counts = np.bincount(bins, minlength=_BINS)
    sums = [
        np.bincount(bins, weights=values, minlength=_BINS) for values in (confidence, predictions(logits) == labels)
    ]
    return counts, sums[0] / np.maximum(counts, 1), sums[1] / np.maximum(counts, 1)


def calibration_error(bins: tuple[np.ndarray, np.ndarray, np.ndarray]) -> float:
    """Returns the expected calibration error of the bins of [`reliability`], a fraction rounded to four digits.

    It is the mean distance between confidence and accuracy (Guo et al. 2017, https://arxiv.org/abs/1706.04599).
    """
    counts, confidence, accuracy = bins
    return round(float(np.sum(counts * np.abs(accuracy - confidence)) / counts.sum()), 4)


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """Finds the temperature that minimises the cross-entropy of logits / temperature.

    Temperature scaling (Guo et al. 2017, https://arxiv.org/abs/1706.04599) changes the confidence of a model, not its
    predictions.

    Args:
        logits: [N, C] float logits of held-out images.
        labels: [N] integer classes.

    Returns:
        The temperature, rounded to four digits and limited to 0.05 to 20. Above 1, the model was too sure. Rows with NaN are
        ignored; without any other row it is 1.

    Example: the model is 90% certain and three of four answers are right, so the best temperature is ln 9 / ln 3.

    ```python
    >>> import numpy as np
    >>> from nkd_hf.recipe.calibration import fit_temperature
    >>> fit_temperature(np.log([[0.9, 0.1]] * 4), np.array([0, 0, 0, 1]))
    2.0

    ```
    """
    check_logits(logits, labels)
    labels, logits = with_class(labels, logits)
    is_number = ~np.isnan(logits).any(axis=1)
    if not is_number.any():
        return 1.0
    labels, shifted = labels[is_number], shifted_logits(logits[is_number])
    target = shifted[np.arange(len(labels)), labels].mean(dtype=np.float64)
    weights = np.empty_like(shifted)
    low, high = np.log(_TEMPERATURES)
    # The cross-entropy is convex in 1 / temperature. Its slope is the expected logit less the label's logit.
    for _ in range(_SEARCH_STEPS):
        middle = (low + high) / 2
        np.exp(np.multiply(shifted, np.float32(np.exp(-middle)), out=weights), out=weights)
        expected = np.einsum("nc,nc->n", weights, shifted) / weights.sum(axis=1)
        if expected.mean(dtype=np.float64) > target:
            low = middle
        else:
            high = middle
    return round(float(np.exp((low + high) / 2)), 4)


def with_class(labels: np.ndarray, *logits: np.ndarray) -> list[np.ndarray]:
    """Selects the images that have a class."""
    if (has_class := labels != NO_CLASS).all():
        return [labels, *logits]
    return [labels[has_class], *(values[has_class] for values in logits)]


def shifted_logits(logits: np.ndarray) -> np.ndarray:
    """Subtracts from each row its largest logit, in float32. Infinite logits become finite, since inf - inf is NaN."""
    logits = np.clip(logits.astype(np.float32), -1e30, 1e30)
    return logits - logits.max(axis=1, keepdims=True)


def check_logits(logits: np.ndarray, labels: np.ndarray) -> None:
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"logits and labels must be arrays [N, C] and [N], got {list(logits.shape)} and {list(labels.shape)}. "
            "Pass one row of logits for each label."
        )
    known = labels[labels != NO_CLASS]
    if len(known) == 0:
        raise ValueError("labels must contain a class, got none. Evaluate images whose classes are known.")
    if known.min() < 0 or known.max() >= logits.shape[1]:
        wrong = known[(known < 0) | (known >= logits.shape[1])][0]
        raise ValueError(
            f"labels must be classes from 0 to {logits.shape[1] - 1}, got {wrong}. Match the labels to the model's classes."
        )
