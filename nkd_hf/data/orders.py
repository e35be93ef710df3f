"""The order of the samples of an epoch: pure functions of their arguments."""

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
        run: positions of a run. The last run stays at the end where it is shorter.
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
