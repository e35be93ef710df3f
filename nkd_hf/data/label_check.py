"""Checks labels on the CPU, where the check does not wait for a device."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ..losses.checks import check_labels


class LabelCheck:
    """Checks the labels in the batches of another collator, in the process or worker that makes the batches.

    The losses can't check the values of labels on a GPU without waiting for the GPU, and a class out of range is an
    unreadable assertion of the device.

    Args:
        collator: returns a mapping, whose `labels` are checked.
        num_labels: number of classes.
        ignore_index: see [`check_labels`].

    Example:
        >>> import torch
        >>> collator = LabelCheck(lambda samples: {"labels": torch.tensor(samples)}, num_labels=3)
        >>> collator([0, 2])
        {'labels': tensor([0, 2])}
    """

    def __init__(self, collator: Callable, num_labels: int, ignore_index: int | None = None):
        self.collator = collator
        self.num_labels = num_labels
        self.ignore_index = ignore_index

    def __call__(self, samples: list[Any]) -> Any:
        batch = self.collator(samples)
        labels = batch.get("labels") if isinstance(batch, Mapping) else None
        if isinstance(labels, Tensor):
            # A collator may make several rows of one sample.
            check_labels(labels, (labels.shape[0] if labels.ndim else 0, self.num_labels), self.ignore_index)
        return batch
