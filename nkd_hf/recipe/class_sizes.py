"""Handles classes of different sizes: the weights of the task loss, and the metrics of an evaluation."""

from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from torch import Tensor

from ..data.arguments import DataArguments
from ..data.labels import read_labels
from ..metrics import compute_balanced_metrics, compute_metrics
from .arguments import RecipeArguments

# Balanced accuracy is measured where the largest class has more than this many times the images of the smallest one.
_UNEQUAL = 2


def check_class_balance(recipe: RecipeArguments, data: DataArguments) -> None:
    """Checks the class weights against the other arguments.

    Raises:
        ValueError: class weights are set for a stream, whose classes nobody has counted, or beside balanced sampling.
    """
    if recipe.class_weights is None:
        return
    if data.streaming:
        raise ValueError(
            f"class_weights must be None with streaming, got {recipe.class_weights}. The sizes of a stream's classes are "
            "unknown: load the dataset without streaming"
        )
    if data.balanced_sampling:
        raise ValueError(
            f"class_weights must be None with balanced_sampling, got {recipe.class_weights}. Each of the two makes up for "
            "the sizes of the classes: set one of them"
        )


def make_class_settings(
    recipe: RecipeArguments, train: Dataset | IterableDataset, class_names: list[str]
) -> dict[str, Any]:
    """Makes the arguments of [`~nkd_hf.recipe.stage.make_trainer`] that depend on the sizes of the classes.

    Args:
        recipe: has `class_weights`.
        train: the training split of [`~nkd_hf.data.loading.load_image_dataset`].
        class_names: by label.

    Returns:
        `dict`: `class_weights`, [C] float32 or None, and `metrics`, which computes balanced accuracy where classes differ
        in size by more than a factor of 2. Classes without images don't count. The classes of a stream, or of images
        without labels, count as equal.

    Raises:
        ValueError: there are class weights, and a class has no training images.
    """
    if isinstance(train, IterableDataset) or "label" not in train.column_names:
        return {"class_weights": None, "metrics": compute_metrics}
    sizes = count_images(train, len(class_names))
    return {
        "class_weights": None if recipe.class_weights is None else balanced_weights(sizes, class_names),
        "metrics": compute_balanced_metrics if are_unequal(sizes) else compute_metrics,
    }


def count_images(split: Dataset, num_classes: int) -> np.ndarray:
    """Counts the images of each class of a split, [C] int64; images without a class do not count."""
    labels = read_labels(split)
    return np.bincount(labels[labels >= 0], minlength=num_classes)


def are_unequal(sizes: np.ndarray) -> bool:
    """Whether the largest class has more than twice the images of the smallest class, empty classes ignored."""
    present = sizes[sizes > 0]
    return len(present) > 0 and bool(present.max() > _UNEQUAL * present.min())


def balanced_weights(sizes: np.ndarray, class_names: list[str]) -> Tensor:
    """Returns scikit-learn's weights N / (C * n_c), [C] float32: their mean over the N images is 1.

    Args:
        sizes: [C] integers, the numbers of images.
        class_names: by label.

    Raises:
        ValueError: a class has no images.

    Example:
        >>> balanced_weights(np.array([30, 10]), ["cat", "dog"])
        tensor([0.6667, 2.0000])
    """
    if empty := [name for name, size in zip(class_names, sizes, strict=True) if size == 0]:
        raise ValueError(
            f"class_weights must be None where a class has no training images, got balanced, and there are none of "
            f"{', '.join(empty[:10])}{' and others' if len(empty) > 10 else ''}. Add images, remove these classes, or set "
            "balanced_sampling, which draws the classes that have images"
        )
    return torch.from_numpy(sizes.sum() / (len(sizes) * sizes)).float()
