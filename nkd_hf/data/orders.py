"""Draws the order of the samples of an epoch, as pure functions of the arguments."""

import itertools
import math
from collections.abc import Callable, Sequence

import torch

from .seeding import derived_seeds

# Batches between two crops of a row, and the fewest with which no loss of accuracy was seen (digits; two were too few).
BATCHES_APART, MIN_BATCHES_APART = 8, 4


def permutation(length: int, seed: int, epoch: int) -> list[int]:
    """Draws a permutation of the numbers below `length`."""
    generator = torch.Generator().manual_seed(derived_seeds(seed, epoch)[2])
    return torch.randperm(length, generator=generator).tolist()


def shuffled_runs(length: int, run: int, seed: int, epoch: int) -> list[int]:
    """Shuffles positions in runs of neighbours, which stay together: a pure function of the arguments.

    Args:
        length: number of positions.
        run: number of positions of a run. A shorter last run stays at the end.
        seed: integer.
        epoch: integer.

    Example:
        >>> positions = shuffled_runs(7, 2, seed=0, epoch=3)
        >>> sorted(positions), positions[-1], all(positions[at] + 1 == positions[at + 1] for at in (0, 2, 4))
        ([0, 1, 2, 3, 4, 5, 6], 6, True)
    """
    num_runs = length // run
    starts = [run * place for place in permutation(num_runs, seed, epoch)]
    return [start + step for start in starts for step in range(run)] + list(range(run * num_runs, length))


def crop_order(
    num_samples: int, crops: int, seed: int, epoch: int, shuffle: bool = True
) -> tuple[list[int], list[int]]:
    """Returns the row of each position of an epoch with several crops of each row, and the number of each position's crop.

    The epochs `crops` k to `crops` k + `crops` - 1 share one order of the rows. Each epoch takes the next part of this
    order, so that together they take all rows. The crops of two rows alternate: a, b, a, b, ... Two neighbours, which
    are mixed, are then of different rows. At the end of a part, the crops of three rows may alternate. The trainer takes
    the positions in the order of [`spread_crops`].

    Args:
        num_samples: number of the dataset's rows, and of an epoch's samples. If it is no multiple of `crops`, two
            parts share a row, and the last samples of a part are omitted.
        crops: number of samples of a row.
        seed: integer.
        epoch: integer.
        shuffle: `False` keeps the order of the dataset.

    Example:
        >>> crop_order(8, 2, seed=0, epoch=1, shuffle=False)
        ([4, 5, 4, 5, 6, 7, 6, 7], [0, 0, 1, 1, 0, 0, 1, 1])
    """
    group, part = divmod(epoch, crops)
    order = permutation(num_samples, seed, group) if shuffle else list(range(num_samples))
    start = part * num_samples // crops
    own = order[start : start + math.ceil(num_samples / crops)]
    rows, numbers = [], []
    last = max(len(own) // 2 - 1, 0)
    for block in range(last + 1):
        members = own[2 * block :] if block == last else own[2 * block : 2 * block + 2]
        rows += members * crops
        numbers += [crop for crop in range(crops) for _ in members]
    return rows[:num_samples], numbers[:num_samples]


def spread_crops(
    num_samples: int, crops: int, batch: int, shuffle: Callable[[int], Sequence[int]] = range
) -> list[int]:
    """Returns the positions of [`crop_order`] in an order in which the crops of a row are eight batches apart.

    Crops of one row in a batch, or in the next ones, cost accuracy. The rows are divided into blocks of eight batches of
    rows, and the last block has the rest, too. A block comes with the first crop of all its rows, then with the second, and
    so on. A process has the same rows in each of them, and so has each of its workers, if their number divides 8: an image
    needs no second decoding there. Two neighbours, which are mixed, stay together.

    Args:
        num_samples: number of positions. Those of three rows at the end of a part stay at the end.
        crops: number of samples of a row.
        batch: number of samples of an optimiser step, of all processes.
        shuffle: returns an order of so many pairs of rows.

    Example:
        >>> spread_crops(16, 4, batch=8)
        [0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15]
    """
    num_rows, run = math.ceil(num_samples / crops), 2 * crops
    num_pairs = min(num_samples // run, num_rows // 2 - num_rows % 2)
    starts = run * torch.tensor(shuffle(max(num_pairs, 0)), dtype=torch.long)
    size, positions = max(1, BATCHES_APART * batch // 2), []
    edges = [size * block for block in range(max(1, len(starts) // size))]
    for start, stop in itertools.pairwise([*edges, len(starts)]):
        block = starts[start:stop]
        places = block[:, None] + torch.arange(run)  # [pairs, 2 crops]
        positions += places.view(-1, crops, 2).transpose(0, 1).flatten().tolist()
    return positions + list(range(len(positions), num_samples))
