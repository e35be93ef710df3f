"""Defines samplers that pass the epoch to a dataset beside the index."""

import functools
import itertools
import operator
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import BatchSampler, Dataset, RandomSampler, Sampler, SequentialSampler

from .orders import crop_order, permutation, shuffled_runs, spread_crops
from .seeding import derived_seeds, seeded


class EpochDataset(Dataset):
    """A map-style dataset whose keys are `(epoch, index)`, `(epoch, index, position)` or `(epoch, index, position, draw)`.

    Subclasses define `__len__` and `get_sample(epoch, index)`, whose result should be a pure function of epoch and index.
    `plain_key` returns the epoch of a plain index. A position is copied into the sample. A draw other than 0 is another
    sample of the same row in the same epoch: `get_sample(epoch, index, draw)`.

    Attributes:
        sampling_labels (`np.ndarray`, *optional*): [N] int64 class of each row, negative for no class. If it is set,
            the trainer draws the rows of an epoch with [`balanced_order`].
        needs_positions (`bool`): whether the trainer's keys must have a position.
        crops_per_image (`int`): number of samples of a row that the trainer takes in an epoch. An epoch then takes a
            `crops_per_image`-th of the rows; see [`~nkd_hf.data.orders.crop_order`].
    """

    sampling_labels: np.ndarray | None = None
    crops_per_image: int = 1
    needs_positions: bool = False

    def __len__(self) -> int:
        raise NotImplementedError

    def get_sample(self, epoch: int, index: int) -> dict:
        """Returns the sample at `index` (0 <= index < len(self)) in `epoch`."""
        raise NotImplementedError

    def without_crops(self) -> "EpochDataset":
        """Returns the dataset for a reader that takes one sample of a row."""
        return self

    def plain_key(self, index: int) -> tuple[int, int]:
        """Returns the epoch and the draw of the sample for a plain index (0 <= index < len(self))."""
        return 0, 0

    def __getitem__(
        self, key: int | tuple[int, int] | tuple[int, int, int] | tuple[int, int, int | None, int]
    ) -> dict:
        epoch, index, position, draw = (*key, None, 0)[:4] if isinstance(key, tuple) else (None, key, None, 0)
        draw = draw or 0
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for a dataset of {len(self)} samples")
        index = index % len(self)
        if epoch is None:
            epoch, draw = self.plain_key(index)
        sample = self.get_sample(epoch, index, draw) if draw else self.get_sample(epoch, index)
        return sample if position is None else sample | {"position": position}


def epoch_order(num_samples: int, seed: int, epoch: int, shuffle: bool = True) -> list[int]:
    """Returns the permutation of an epoch: a pure function of the arguments.

    Args:
        num_samples: length of the dataset.
        seed: integer.
        epoch: integer.
        shuffle: `False` keeps the order of the dataset.

    Example:
        >>> sorted(epoch_order(4, seed=0, epoch=2)), epoch_order(4, seed=0, epoch=2, shuffle=False)
        ([0, 1, 2, 3], [0, 1, 2, 3])
    """
    if not shuffle:
        return list(range(num_samples))
    return permutation(num_samples, seed, epoch)


def balanced_order(labels: np.ndarray, seed: int, epoch: int) -> list[int]:
    """Draws the rows of an epoch with replacement, each class with the same probability: a pure function of the arguments.

    Args:
        labels: [N] integer class of each row. A row with a negative class is never drawn.
        seed: integer.
        epoch: integer.

    Returns:
        N rows. Within a class, each row has the same probability.

    Example:
        >>> labels = np.array([0] * 90 + [1] * 10)
        >>> rows = balanced_order(labels, seed=0, epoch=2)
        >>> len(rows), sum(labels[rows]).item()
        (100, 56)
    """
    generator = torch.Generator().manual_seed(derived_seeds(seed, epoch)[2])
    rows = np.argsort(labels, kind="stable")[np.count_nonzero(labels < 0) :]
    _, starts, sizes = np.unique(labels[rows], return_index=True, return_counts=True)
    classes = torch.randint(len(sizes), (len(labels),), generator=generator).numpy()
    places = torch.rand(len(labels), dtype=torch.float64, generator=generator).numpy() * sizes[classes]
    return rows[starts[classes] + places.astype(np.int64)].tolist()


class EpochSampler(Sampler[tuple[int, ...]]):
    """Yields the keys `(epoch, index)` of an [`EpochDataset`], each index once an epoch, or classes equally often.

    The order is a pure function of `(seed, epoch)`, and with several crops of `batch`: it is the same in all processes and
    in a resumed epoch, and reads no global generator. If a row comes again in an epoch, its key has its draw, so that it gets
    another augmentation.

    Args:
        num_samples: length of the dataset.
        seed: integer.
        shuffle: `False` keeps the order of the dataset.
        positions: whether keys are `(epoch, index, position)`, with the position in the epoch's permutation.
        pairs: whether the positions 2k and 2k + 1 belong together: the last sample of an odd dataset then comes twice, so
            that no pair is split when the last batches are filled up with the first samples.
        labels: [num_samples] integers, by which [`balanced_order`] draws the rows. None takes each row once.
        crops: number of samples of a row in an epoch, which takes a `crops`-th of the rows: see
            [`~nkd_hf.data.orders.crop_order`].
        cycle: number of epochs after which the samples come again, with the same keys. They are shuffled, but pairs
            stay together, and the crops of a row as far apart as they were. None repeats no epoch.
        batch: number of samples of an optimiser step, of all processes, by which the crops of a row are spread: see
            [`~nkd_hf.data.orders.spread_crops`]. None keeps the order of the positions.

    Raises:
        ValueError: `num_samples`, `crops` or `cycle` is not positive, or `labels` are passed without `shuffle` or with
            several `crops`.

    Example:
        >>> sampler = EpochSampler(3, seed=0, shuffle=False)
        >>> sampler.set_epoch(5)
        >>> list(sampler)
        [(5, 0), (5, 1), (5, 2)]
    """

    def __init__(
        self,
        num_samples: int,
        seed: int,
        shuffle: bool = True,
        positions: bool = False,
        pairs: bool = False,
        labels: np.ndarray | None = None,
        crops: int = 1,
        cycle: int | None = None,
        batch: int | None = None,
    ):
        if num_samples < 1:
            raise ValueError(f"num_samples must be positive, got {num_samples}: the dataset is empty")
        if cycle is not None and cycle < 1:
            raise ValueError(f"cycle must be positive, got {cycle}. Omit it to repeat no epoch")
        if crops < 1 or (crops > 1 and labels is not None):
            raise ValueError(f"crops must be positive, and 1 with labels, got {crops}. Omit it")
        if labels is not None and not shuffle:
            raise ValueError("shuffle must be True with labels, by which rows are drawn, got False. Omit labels")
        self.num_samples = num_samples
        self.seed = seed
        self.shuffle = shuffle
        self.positions = positions
        self.pairs = pairs
        self.labels = labels
        self.crops = crops
        self.cycle = cycle
        self.batch = batch
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch of the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_samples + (self.num_samples % 2 if self.pairs else 0)

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        epoch = self.epoch if self.cycle is None else self.epoch % self.cycle
        order, draws = self._draw_rows(epoch)
        positions = self._order_positions(is_repeated=epoch != self.epoch)
        positions = [min(position, self.num_samples - 1) for position in positions]
        return (_key(epoch, order[at], at if self.positions else None, draws[at]) for at in positions)

    def _order_positions(self, is_repeated: bool) -> Sequence[int]:
        is_shuffled = is_repeated and self.shuffle
        if self.crops > 1 and self.batch is not None:
            shuffle = functools.partial(permutation, seed=self.seed, epoch=self.epoch) if is_shuffled else range
            positions = spread_crops(self.num_samples, self.crops, self.batch, shuffle)
            return [*positions, *range(self.num_samples, len(self))]
        if is_shuffled:
            run = 2 * self.crops if self.pairs or self.crops > 1 else 1
            return shuffled_runs(len(self), run, self.seed, self.epoch)
        return range(len(self))

    def _draw_rows(self, epoch: int) -> tuple[list[int], list[int]]:
        """Returns the rows of an epoch, and for each the number of times that it came before in this epoch."""
        if self.crops > 1:
            return crop_order(self.num_samples, self.crops, self.seed, epoch, self.shuffle)
        if self.labels is None:
            return epoch_order(self.num_samples, self.seed, epoch, self.shuffle), [0] * self.num_samples
        order, times, draws = balanced_order(self.labels, self.seed, epoch), Counter(), []
        for row in order:
            draws.append(times[row])
            times[row] += 1
        return order, draws


def _key(epoch: int, index: int, position: int | None, draw: int) -> tuple[int | None, ...]:
    """Returns the shortest key of a sample."""
    if draw:
        return epoch, index, position, draw
    return (epoch, index) if position is None else (epoch, index, position)


def check_positions(samples: list[dict]) -> None:
    if not all("epoch" in sample and "position" in sample for sample in samples):
        raise ValueError(
            "mixing in pairs and stored teacher logits need samples that carry epoch and position, got "
            f"{', '.join(samples[0])}: train on an ImageDataset with DistillationTrainer, not on a stream or a list"
        )
    if len({sample["epoch"] for sample in samples}) > 1:
        raise ValueError("a batch holds samples of several epochs: take EpochSampler's order")


__all__ = ["EpochIndices", "training_sampler"]

# Number of indices that are drawn at a time: `seeded` takes 20 microseconds for each block.
_BLOCK = 64


class EpochIndices(Sampler[Any]):
    """Adds the epoch to the indices of a sampler and, for a repeated row, the number of times that it came before.

    `random`, numpy and torch are seeded by seed and epoch while the sampler draws. Each process reads the whole
    sampler and takes its share. So all processes agree on the order, and a resumed epoch has the same order. (A
    sampler with a generator of its own draws from its generator.)

    Args:
        sampler: yields indices; keys of an [`EpochDataset`] are not changed.
        seed: integer.
        num_rows: length of the [`EpochDataset`] that the keys are for. None does not change the indices: the processes
            only share the order.

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
            yield _key(epoch, index, None, int(times[index]) - 1)

    def _indices(self, epoch: int) -> Iterator[Any]:
        # With a fourth part and draw 0, the key differs from the keys of all rows' augmentations.
        with seeded(self.seed, epoch, -1, 0):
            indices = iter(self.sampler)
        for block in itertools.count():
            with seeded(self.seed, epoch, block, 0):
                drawn = list(itertools.islice(indices, _BLOCK))
            if not drawn:
                return
            yield from drawn


def training_sampler(sampler: Sampler | None, dataset: Dataset, seed: int, num_processes: int = 1) -> Sampler | None:
    """Returns a sampler for training, with the epoch and with an order that all processes share.

    Args:
        sampler: the result of `Trainer._get_train_sampler`; None keeps the order of the dataset.
        dataset: the dataset that the sampler's indices are for.
        seed: integer.
        num_processes: number of processes that train.

    Returns:
        The sampler itself, or an [`EpochIndices`] around it.
    """
    if isinstance(sampler, EpochSampler | BatchSampler):
        return sampler
    if isinstance(dataset, EpochDataset):
        return EpochIndices(SequentialSampler(dataset) if sampler is None else sampler, seed, len(dataset))
    # accelerate seeds a RandomSampler alike in all processes.
    if num_processes == 1 or sampler is None or isinstance(sampler, RandomSampler | SequentialSampler):
        return sampler
    return EpochIndices(sampler, seed)
