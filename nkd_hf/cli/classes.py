"""Matches the classes of a dataset with those of a saved model."""

import datasets
import torch
from transformers import PreTrainedModel

from ..data.labels import describe_synsets
from ..models.labels import class_numbers, is_generic, match_labels, whole_numbers


def match_classes(
    label: datasets.ClassLabel | datasets.Value, model: PreTrainedModel, match_names: bool
) -> tuple[list[int] | None, torch.Tensor | None]:
    """Matches the classes of a dataset with the classes of a model.

    Args:
        label: the feature of the dataset's labels.
        model: the model.
        match_names: whether classes are matched by their names; else by their numbers.

    Returns:
        The positions of the dataset's classes among the model's logits, and the position for each label. At least one
        of the two is None; None changes nothing.

    Raises:
        ValueError: the classes differ.
    """
    num_classes = model.config.num_labels
    # Only a stream of plain integers has no names; see load_image_dataset.
    names = label.names if isinstance(label, datasets.ClassLabel) else [f"LABEL_{i}" for i in range(num_classes)]
    if match_names:
        return _find_order(names, model), None
    if not isinstance(label, datasets.ClassLabel):
        return None, None
    if len(names) != num_classes and not is_generic(names) and whole_numbers(names) is None:
        raise ValueError(
            f"the dataset must have the model's {num_classes} classes, which --ignore_label_names takes by their "
            f"numbers, got {len(names)}. Name another dataset, or match the classes by their names"
        )
    return None, torch.tensor(class_numbers(names, num_classes))


def _find_order(names: list[str], model: PreTrainedModel) -> list[int] | None:
    """Finds the positions of the dataset's classes among the model's logits; None where the order is the same."""
    num_classes = model.config.num_labels
    names = describe_synsets(names)
    if names == [f"LABEL_{i}" for i in range(len(names))] and len(names) < num_classes:
        # The labels are plain integers, and the highest class may not occur.
        names = [f"LABEL_{i}" for i in range(num_classes)]
    return match_labels(
        names,
        model.config.id2label,
        "the model",
        roles=("dataset", "model"),
        advice="Name another dataset, or take the classes by their numbers with --ignore_label_names",
    )
