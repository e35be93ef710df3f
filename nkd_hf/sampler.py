"""Carries the epoch with the indices of any sampler."""

import itertools
import operator
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.utils.data import BatchSampler, Dataset, RandomSampler, Sampler, SequentialSampler

from .batches import EpochDataset, EpochSampler, seeded

__all__ = ["EpochIndices", "training_sampler"]

# Indices that are drawn at a time: the generators of a process are seeded for each block, which takes 20 microseconds.
_BLOCK = 64


class EpochIndices(Sampler[Any]):
    """Adds the epoch to the indices of a sampler, and to those of a repeated row how often it came before in this epoch.

    The sampler draws from `random`, numpy and torch as they are seeded by seed and epoch. All processes, of which each
    goes through the whole sampler and takes its share, then agree on the order, and a resumed epoch gets the order that it
    had. (A sampler with a generator of its own draws from that.)

    Args:
        sampler: yields indices; keys of an [`EpochDataset`] pass as they are.
        seed: integer.
        num_rows: length of the [`EpochDataset`] that the keys are for. None yields the indices as they are: the order
            alone is shared.

    Example:
        >>> sampler = EpochIndices([2, 0, 2], seed=0, num_rows=3)
        >>> sampler.set_epoch(5)
        >>> list(sampler)
        [(5, 2), (5, 0), (5, 2, None, 1)]
    """

    def __init__(self, sampler: Sampler, seed: int, num_rows: int | None = None):
        self.sampler = sampler
        self.seed = seed
        self.num_rows = num_rows
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch of the next iteration."""
        self.epoch = epoch
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Any]:
        epoch, times = self.epoch, np.zeros(self.num_rows or 0, dtype=np.int32)
        for index in self._indices(epoch):
            if self.num_rows is None or isinstance(index, tuple):
                yield index
                continue
            index = operator.index(index)
            if not -self.num_rows <= index < self.num_rows:
                yield epoch, index  # The dataset raises IndexError.
                continue
            times[index] += 1
            yield (epoch, index) if times[index] == 1 else (epoch, index, None, int(times[index]) - 1)

    def _indices(self, epoch: int) -> Iterator[Any]:
        # With a fourth part, the key is that of no row's augmentation.
        with seeded(self.seed, epoch, -1, 0):
            indices = iter(self.sampler)
        for block in itertools.count():
            with seeded(self.seed, epoch, block, 0):
                drawn = list(itertools.islice(indices, _BLOCK))
            if not drawn:
                return
            yield from drawn


def training_sampler(sampler: Sampler | None, dataset: Dataset, seed: int, num_processes: int = 1) -> Sampler | None:
    """The sampler of a training, with the epoch and with an order that all processes share.

    Args:
        sampler: as `Trainer._get_train_sampler` returns it; None is the order of the dataset.
        dataset: what it samples from.
        seed: integer.
        num_processes: how many processes train.

    Returns:
        The sampler itself, or an [`EpochIndices`] around it.
    """
    if isinstance(sampler, EpochSampler | BatchSampler):
        return sampler
    if isinstance(dataset, EpochDataset):
        return EpochIndices(SequentialSampler(dataset) if sampler is None else sampler, seed, len(dataset))
    # accelerate gives a RandomSampler one seed in all processes.
    if num_processes == 1 or sampler is None or isinstance(sampler, RandomSampler | SequentialSampler):
        return sampler
    return EpochIndices(sampler, seed)
