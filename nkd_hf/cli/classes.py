"""Matches the classes of a dataset with those of a saved model."""

import datasets
import torch
from transformers import PreTrainedModel

from ..data.labels import describe_synsets
from ..models.labels import class_numbers, is_generic, match_labels, whole_numbers


def match_classes(
    label: datasets.ClassLabel | datasets.Value, model: PreTrainedModel, match_names: bool
) -> tuple[list[int] | None, torch.Tensor | None]:
    """Matches the classes of a dataset with a model's.

    Args:
        label: the feature of the dataset's labels.
        model: the model.
        match_names: whether classes are matched by their names; else by their numbers.

    Returns:
        Where the dataset's classes stand among the model's logits, and the number that each label stands for among them.
        None where nothing changes. One of the two is None.

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
    """Finds where the dataset's classes stand among the model's logits; None where they are in the same order."""
    num_classes = model.config.num_labels
    names = describe_synsets(names)
    if names == [f"LABEL_{i}" for i in range(len(names))] and len(names) < num_classes:
        # Plain integers: nothing says that the highest one that occurs is the last class.
        names = [f"LABEL_{i}" for i in range(num_classes)]
    return match_labels(
        names,
        model.config.id2label,
        "the model",
        roles=("dataset", "model"),
        advice="Name another dataset, or take the classes by their numbers with --ignore_label_names",
    )
