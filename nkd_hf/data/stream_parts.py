"""Divides a streamed dataset among processes and their DataLoader workers."""

import collections
import itertools
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import fsspec.asyn
import numpy as np
from datasets import IterableDataset

__all__ = ["shuffled_part"]

_Row = TypeVar("_Row")
# Number of shards that are read in turn, as in `IterableDataset.shuffle`: in a shard, rows of one class often follow
# each other.
_SHARDS_AT_ONCE = 10


def shuffled_part(
    dataset: IterableDataset, part: int, num_parts: int, seed: int, buffer_size: int
) -> Iterator[dict[str, Any]]:
    """Reads one of the equal parts of a stream, which together have each row once.

    The N shards are put end to end, and each is cut into `num_parts` pieces (a row's piece is its number modulo
    `num_parts`). Every part is N pieces that follow each other. So a part reads N / `num_parts` shards and pieces of
    at most two more, and parts differ in size by no more than shards do.

    Args:
        dataset: a stream that is not shuffled. All parts must be read from the same dataset.
        part: number of the part, from 0.
        num_parts: number of parts, which may be larger than the number of shards.
        seed: seed of the orders of shards and rows.
        buffer_size: number of rows among which the next one is drawn.
    """
    # fsspec's lock may be held when a process is forked. `datasets` resets it in its own loop over a worker's shards.
    fsspec.asyn.reset_lock()
    num_shards = dataset.num_shards
    order = np.random.default_rng(seed).permutation(num_shards)
    places = range(part * num_shards // num_parts, ((part + 1) * num_shards - 1) // num_parts + 1)

    def rows(place: int) -> Iterator[dict[str, Any]]:
        shard = dataset.shard(num_shards, int(order[place]))
        # shard.__iter__ would divide the rows among the DataLoader's workers once more.
        for number, batch in enumerate(shard.iter(batch_size=1)):
            if (place * num_parts + number % num_parts) // num_shards == part:
                yield {name: values[0] for name, values in batch.items()}

    return _shuffled(_in_turn(map(rows, places)), np.random.default_rng([seed, part]), buffer_size)


def _in_turn(sources: Iterator[Iterator[_Row]]) -> Iterator[_Row]:
    """Takes a row of each source in turn; the next source replaces a source that has ended."""
    opened = collections.deque(itertools.islice(sources, _SHARDS_AT_ONCE))
    while opened:
        source = opened.popleft()
        try:
            row = next(source)
        except StopIteration:
            opened.extend(itertools.islice(sources, 1))
            continue
        opened.append(source)
        yield row


def _shuffled(rows: Iterable[_Row], generator: np.random.Generator, buffer_size: int) -> Iterator[_Row]:
    buffer: list[_Row] = []
    for row in rows:
        if len(buffer) < buffer_size:
            buffer.append(row)
            continue
        place = generator.integers(buffer_size)
        buffer[place], row = row, buffer[place]
        yield row
    yield from (buffer[place] for place in generator.permutation(len(buffer)))
