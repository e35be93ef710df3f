"""Makes random numbers a function of seed, epoch and row."""

import hashlib
import operator
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derived_seeds(*key: int) -> tuple[int, int, int]:
    """Returns three independent 64-bit seeds, a hash of the integers: seeds of nearby keys must not correlate."""
    digest = hashlib.blake2b(repr([operator.index(part) for part in key]).encode(), digest_size=24).digest()
    return tuple(int.from_bytes(digest[start : start + 8], "little") for start in (0, 8, 16))


@contextmanager
def seeded(*key: int, torch_only: bool = False) -> Iterator[None]:
    """Makes `random`, numpy's global generator and torch's CPU generator a pure function of the integers.

    The generators' states are restored at the end, also after an exception: with `num_workers=0` the samples are made in
    the process that trains, whose own draws (dropout, drop path) must not depend on the samples. (Only the second half
    of a pair of normals, which `np.random.randn` keeps, is lost.) No other generator, such as a GPU's, is changed.

    Args:
        key: any integers, for example `seed, epoch, index`.
        torch_only: whether `random` and numpy, whose states are large, are not changed, for code that does not draw
            from them; torch's draws are the same in either case.

    Example:
        >>> import torch
        >>> with seeded(0, 3, 17):
        ...     first = torch.rand(2)
        >>> with seeded(0, 3, 17):
        ...     second = torch.rand(2)
        >>> torch.equal(first, second)
        True
    """
    python_seed, numpy_seed, torch_seed = derived_seeds(*key)
    torch_state = torch.get_rng_state()
    torch.default_generator.manual_seed(torch_seed)  # torch.manual_seed would seed the accelerators as well
    try:
        if torch_only:
            yield
        else:
            with _python_and_numpy_seeded(python_seed, numpy_seed):
                yield
    finally:
        torch.set_rng_state(torch_state)


@contextmanager
def _python_and_numpy_seeded(python_seed: int, numpy_seed: int) -> Iterator[None]:
    python_state = random.getstate()
    # The generator is replaced, since np.random.get_state and set_state would double the cost of `seeded`.
    numpy_generator = np.random.get_bit_generator()
    random.seed(python_seed)
    np.random.set_bit_generator(np.random.PCG64(numpy_seed))
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_bit_generator(numpy_generator)
