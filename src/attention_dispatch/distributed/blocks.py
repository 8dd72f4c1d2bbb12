"""Attention between two sets of global token indices, as calls that any kernel can serve.

A ring step attends from one rank's queries to another rank's keys. Under causality or a window most of such a pair is
fully visible or fully hidden; only the diagonal crosses a few pieces. :func:`plan_blocks` cuts the pair so that every
call is plain attention, square top-left causal attention, or a band with known sides, and drops what is hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .positions import Range, count

# Rows of one call when a band has to be given as a dense bool mask: the mask of a tile is 1024 x (1024 + window) bytes.
_TILE_ROWS = 1024


class Block(NamedTuple):
    """One call of a kernel: local slices of queries and keys, and what they see of each other.

    ``window`` counts from the first query and key of the block: query i sees keys ``i - left <= j <= i + right``;
    -1 is unbounded. ``dense`` says that the window has to be given as a bool mask.
    """

    q_start: int
    q_stop: int
    kv_start: int
    kv_stop: int
    is_causal: bool = False
    window: tuple[int, int] = (-1, -1)
    dense: bool = False

    @property
    def queries(self) -> slice:
        """Slice of the local query tokens."""
        return slice(self.q_start, self.q_stop)

    @property
    def keys(self) -> slice:
        """Slice of the local key tokens."""
        return slice(self.kv_start, self.kv_stop)

    @property
    def shape(self) -> tuple[int, int]:
        """Number of queries and of keys."""
        return self.q_stop - self.q_start, self.kv_stop - self.kv_start

    def visible(self, device: torch.device | str) -> Tensor:
        """Bool mask (queries, keys) of the block, True where the key is seen."""
        rows, columns = self.shape
        left, right = (-1, 0) if self.is_causal else self.window
        offset = torch.arange(columns, device=device) - torch.arange(rows, device=device)[:, None]
        seen = torch.ones(rows, columns, dtype=torch.bool, device=device)
        if left >= 0:
            seen &= offset >= -left
        if right >= 0:
            seen &= offset <= right
        return seen


@lru_cache(maxsize=4096)
def plan_blocks(
    queries: tuple[Range, ...], keys: tuple[Range, ...], is_causal: bool, window: tuple[int, int]
) -> tuple[Block, ...]:
    """Blocks that together cover exactly the visible pairs of the two index sets, each pair once.

    Args:
        queries: global ranges of the local queries, ascending.
        keys: global ranges of the local keys, ascending.
        is_causal: query i sees keys j <= i, on global indices.
        window: ``(left, right)`` on global indices, -1 unbounded; combined with ``is_causal`` by logical and.
    """
    total_q, total_k = count(queries), count(keys)
    left, right = window[0], 0 if is_causal else window[1]
    if not total_q or not total_k:
        return ()
    if left < 0 and right < 0:
        return (Block(0, total_q, 0, total_k),)
    if left < 0 and right == 0 and queries == keys:
        # The same ascending tokens on both sides: causality on local positions is causality on global ones.
        return (Block(0, total_q, 0, total_k, is_causal=True),)
    blocks: list[Block] = []
    q_local = 0
    for q_range in queries:
        row: list[Block] = []
        k_local = 0
        for k_range in keys:
            row += _pair(q_range, q_local, k_range, k_local, left, right)
            k_local += k_range[1] - k_range[0]
        blocks += _join_keys(row)
        q_local += q_range[1] - q_range[0]
    return tuple(_join_queries(blocks))


def _pair(q_range: Range, q_local: int, k_range: Range, k_local: int, left: int, right: int) -> list[Block]:
    """Blocks between one contiguous range of queries and one of keys."""
    (q0, q1), (k0, k1) = q_range, k_range
    # Rows that see at least one key, then keys that at least one of those rows sees.
    if right >= 0:
        q0 = max(q0, k0 - right)
    if left >= 0:
        q1 = min(q1, k1 + left)
    if q0 >= q1:
        return []
    if left >= 0:
        k0 = max(k0, q0 - left)
    if right >= 0:
        k1 = min(k1, q1 + right)
    q_at, k_at = q_local - q_range[0], k_local - k_range[0]
    whole = (q_at + q0, q_at + q1, k_at + k0, k_at + k1)
    if left < 0 or k0 >= q1 - 1 - left:
        left = -1
    if right < 0 or k1 - 1 <= q0 + right:
        right = -1
    if left < 0 and right < 0:
        return [Block(*whole)]
    if left < 0 and right == 0:
        return _staircase(q0, q1, q_at, k0, k1, k_at)
    shift = k0 - q0
    return [Block(*whole, window=(left + shift if left >= 0 else -1, right - shift if right >= 0 else -1))]


def _staircase(q0: int, q1: int, q_at: int, k0: int, k1: int, k_at: int) -> list[Block]:
    """Causal attention of overlapping ranges: a plain rectangle for what lies before, a square on the diagonal."""
    blocks = []
    start, stop = max(q0, k0), min(q1, k1)
    if start > k0:
        blocks.append(Block(q_at + start, q_at + q1, k_at + k0, k_at + start))
    blocks.append(Block(q_at + start, q_at + stop, k_at + start, k_at + stop, is_causal=True))
    if stop < q1:
        blocks.append(Block(q_at + stop, q_at + q1, k_at + start, k_at + stop))
    return blocks


def _plain(block: Block) -> bool:
    return not block.is_causal and block.window == (-1, -1)


def _join_keys(row: list[Block]) -> list[Block]:
    """Join plain neighbours along the keys."""
    joined: list[Block] = []
    for block in row:
        last = joined[-1] if joined else None
        if (
            last
            and _plain(last)
            and _plain(block)
            and last.kv_stop == block.kv_start
            and (last.q_start, last.q_stop) == (block.q_start, block.q_stop)
        ):
            joined[-1] = last._replace(kv_stop=block.kv_stop)
        else:
            joined.append(block)
    return joined


def _join_queries(blocks: list[Block]) -> list[Block]:
    """Join plain neighbours along the queries."""
    joined: list[Block] = []
    for block in blocks:
        for index, other in enumerate(joined):
            if (
                _plain(other)
                and _plain(block)
                and other.q_stop == block.q_start
                and (other.kv_start, other.kv_stop) == (block.kv_start, block.kv_stop)
            ):
                joined[index] = other._replace(q_stop=block.q_stop)
                break
        else:
            joined.append(block)
    return joined


@lru_cache(maxsize=4096)
def tile_band(block: Block) -> tuple[Block, ...]:
    """Cut a band for a kernel without windows: tiles of rows with a dense mask each, plain where all is visible."""
    left, right = block.window
    rows, columns = block.shape
    tiles = []
    for start in range(0, rows, _TILE_ROWS):
        stop = min(start + _TILE_ROWS, rows)
        first = max(0, start - left) if left >= 0 else 0
        last = min(columns, stop + right) if right >= 0 else columns
        if first >= last:
            continue
        sides = (left + first - start if left >= 0 else -1, right + start - first if right >= 0 else -1)
        # A side that hides nothing in the tile is dropped; what is left may be a plain rectangle.
        if sides[0] >= stop - start - 1:
            sides = (-1, sides[1])
        if sides[1] >= last - first - 1:
            sides = (sides[0], -1)
        tiles.append(
            Block(
                block.q_start + start,
                block.q_start + stop,
                block.kv_start + first,
                block.kv_start + last,
                window=sides,
                dense=sides != (-1, -1),
            )
        )
    return tuple(tiles)


def pairs_seen(blocks: Sequence[Block]) -> int:
    """Query-key pairs that the kernels compute for the blocks; a causal square counts half, a band its rectangle."""
    return sum(rows * columns // (2 if block.is_causal else 1) for block in blocks for rows, columns in (block.shape,))
