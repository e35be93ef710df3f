"""Compares the class names of datasets with each other and with a student's."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import datasets
from torch.utils.data import ConcatDataset, Subset

from ..models.labels import match_labels, normalize_id2label, whole_numbers
from .image_datasets import ImageDataset, StreamingImageDataset
from .labels import describe_synsets


def check_dataset_classes(id2label: Mapping[Any, str] | Sequence[str], by_argument: Mapping[str, Any]) -> None:
    """Checks that the labels of image datasets are the student's classes.

    Names are compared as [`~nkd_hf.data.labels.label_names`] returns them. The numbers `0` to `n-1`, or `LABEL_0` and
    so on,
    are no names: they match any names except the same numbers in another order.

    Args:
        id2label: the student's classes.
        by_argument: datasets by the names of their arguments. Only `ImageDataset`, `StreamingImageDataset` and a `Subset`
            or `ConcatDataset` of them are checked.

    Raises:
        ValueError: a dataset has more classes than the student, or other names than the student or another dataset, or
            the same names in another order.
    """
    student = describe_synsets(list(normalize_id2label(id2label, of="the student's id2label").values()))
    known = {"student": student}
    for argument, dataset in by_argument.items():
        for names in _class_names(dataset):
            if len(names) > len(student):
                raise ValueError(
                    f"{argument} must have the student's {len(student)} classes at most, got {len(names)}. Build the student "
                    "with id2label=label_names(data)"
                )
            for other, expected in known.items():
                _compare(expected, names, other, argument)
            known.setdefault(argument, names)


def _class_names(dataset: Any) -> Iterator[list[str]]:
    if isinstance(dataset, ConcatDataset):
        for part in dataset.datasets:
            yield from _class_names(part)
    elif isinstance(dataset, Subset):
        yield from _class_names(dataset.dataset)
    elif isinstance(dataset, ImageDataset | StreamingImageDataset):
        label = dataset.dataset.features.get("label")
        if isinstance(label, datasets.ClassLabel):
            yield describe_synsets(label.names)


def _compare(expected: list[str], names: list[str], other: str, argument: str) -> None:
    numbers = whole_numbers(expected), whole_numbers(names)
    are_numbers_alike = None not in numbers and set(numbers[0]) == set(numbers[1])
    if not are_numbers_alike and ([*range(len(expected))] in numbers or [*range(len(names))] in numbers):
        return
    advice = "Give the student and all datasets the same classes, with id2label=label_names(data) for the student"
    order = match_labels(expected, names, argument, roles=(other, argument), advice=advice)
    if order is not None:
        first = next(i for i, position in enumerate(order) if i != position)
        raise ValueError(
            f"the classes of {argument} must stand in the order of the {other}'s, got {names[first]!r} for class {first}, "
            f"which is {expected[first]!r} there. {advice}"
        )
