"""Which tokens of the whole sequence each rank holds.

A rank's shard is a tuple of half-open ranges of global token indices, in the order in which the tokens lie in the
rank's tensor. Causality, windows and masks are defined on global indices only, so every part of context parallelism
derives what it needs from these ranges and none of them assumes equal shards or one contiguous piece per rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

Range = tuple[int, int]


class ShardLayout(NamedTuple):
    """Global token ranges of every rank.

    Attributes:
        ranges: for each rank, its ``(start, stop)`` ranges of global indices, in local order and ascending.
    """

    ranges: tuple[tuple[Range, ...], ...]

    @property
    def world(self) -> int:
        """Number of ranks."""
        return len(self.ranges)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Number of tokens on each rank."""
        return tuple(count(ranges) for ranges in self.ranges)

    @property
    def total(self) -> int:
        """Length of the whole sequence."""
        return sum(self.lengths)

    def in_global_order(self, ranks: Sequence[int] | None = None) -> list[tuple[int, int, int]]:
        """Pieces ``(rank, local_start, local_stop)`` of the given ranks (default all), sorted by global index."""
        pieces = []
        for rank in range(self.world) if ranks is None else ranks:
            local = 0
            for start, stop in self.ranges[rank]:
                pieces.append((start, rank, local, local + stop - start))
                local += stop - start
        return [piece[1:] for piece in sorted(pieces)]

    def joined(self, groups: Sequence[Sequence[int]]) -> ShardLayout:
        """Layout in which each group of ranks is one rank that holds all their tokens in global order."""
        return ShardLayout(tuple(merge(r for rank in group for r in self.ranges[rank]) for group in groups))


def count(ranges: Sequence[Range]) -> int:
    """Number of tokens in the ranges."""
    return sum(stop - start for start, stop in ranges)


def merge(ranges) -> tuple[Range, ...]:
    """Sort ranges by start and join those that touch."""
    merged: list[Range] = []
    for start, stop in sorted(ranges):
        if start == stop:
            continue
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], stop)
        else:
            merged.append((start, stop))
    return tuple(merged)


def contiguous(lengths: Sequence[int]) -> ShardLayout:
    """Rank after rank, each with one contiguous range of the given length."""
    ranges, start = [], 0
    for length in lengths:
        ranges.append(((start, start + length),) if length else ())
        start += length
    return ShardLayout(tuple(ranges))


def head_tail(total: int, world: int) -> ShardLayout:
    """Rank r holds chunk r and chunk ``2 * world - 1 - r`` of ``2 * world`` chunks, so that causal work is balanced.

    Chunks differ by one token at most when ``total`` does not divide.
    """
    size, rest = divmod(total, 2 * world)
    edges = [chunk * size + min(chunk, rest) for chunk in range(2 * world + 1)]
    pairs = [((edges[r], edges[r + 1]), (edges[-r - 2], edges[-r - 1])) for r in range(world)]
    return ShardLayout(tuple(merge(pair) for pair in pairs))


def even_lengths(total: int, world: int) -> tuple[int, ...]:
    """Split ``total`` tokens over ``world`` ranks; the first ``total % world`` ranks hold one more."""
    size, rest = divmod(total, world)
    return tuple(size + (rank < rest) for rank in range(world))
