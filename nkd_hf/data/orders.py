"""Draws the order of the samples of an epoch, as pure functions of the arguments."""

import math

import torch

from .seeding import derived_seeds


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
    """Returns the row of each sample of an epoch with several crops of each row, and the number of each sample's crop.

    The epochs `crops` k to `crops` k + `crops` - 1 share one order of the rows. Each epoch takes the next part of this
    order, so that together they take all rows. The crops of two rows alternate: a, b, a, b, ... Two neighbours, which
    are mixed, are then of different rows, and a batch of a multiple of 2 `crops` samples has all crops of its rows. At
    the end of a part, the crops of three rows may alternate.

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
