"""Collectives of context parallelism: heads against tokens (all-to-all) and gathering shards of unequal length.

Buffers are laid out with tokens first. A receive buffer is then already the sequence of the group in rank order, for
any batch size, and becomes (B, S, H, D) by a transpose that copies nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .positions import ShardLayout


class HeadRange(NamedTuple):
    """Query heads ``[q_start, q_stop)`` and the key heads ``[kv_start, kv_stop)`` that they use."""

    q_start: int
    q_stop: int
    kv_start: int
    kv_stop: int

    @property
    def queries(self) -> tuple[int, int]:
        """Range of query heads."""
        return self.q_start, self.q_stop

    @property
    def keys(self) -> tuple[int, int]:
        """Range of key heads."""
        return self.kv_start, self.kv_stop


def assign_heads(heads: int, kv_heads: int, world: int) -> tuple[HeadRange, ...]:
    """Heads of each rank of a Ulysses group; a rank may get none.

    With at least one key head per rank, whole key heads are dealt with their query heads. With fewer, several ranks
    share a key head: each holds a copy of it and a part of its query heads.
    """
    group = heads // max(kv_heads, 1)
    if kv_heads >= world:
        edges = _edges(kv_heads, world)
        return tuple(HeadRange(a * group, b * group, a, b) for a, b in itertools.pairwise(edges))
    ranges = []
    ranks = _edges(world, kv_heads)
    for kv_head, (first, last) in enumerate(itertools.pairwise(ranks)):
        edges = _edges(group, last - first)
        for a, b in itertools.pairwise(edges):
            start = kv_head * group
            ranges.append(HeadRange(start + a, start + b, kv_head, kv_head + (b > a)))
    return tuple(ranges)


def chunk_heads(assigned: Sequence[HeadRange], chunks: int) -> tuple[tuple[HeadRange, ...], ...]:
    """Cut every rank's heads into ``chunks`` parts of whole key heads: ``result[chunk][rank]``; parts may be empty."""
    table = []
    for rank in assigned:
        kv_heads = rank.kv_stop - rank.kv_start
        group = (rank.q_stop - rank.q_start) // max(kv_heads, 1)
        edges = _edges(kv_heads, chunks)
        table.append([HeadRange(rank.q_start + a * group, rank.q_start + b * group,
                                rank.kv_start + a, rank.kv_start + b) for a, b in itertools.pairwise(edges)])
    return tuple(zip(*table))


def _edges(total: int, parts: int) -> list[int]:
    size, rest = divmod(total, parts)
    return [part * size + min(part, rest) for part in range(parts + 1)]


class Pending:
    """A collective in flight and the tensor it fills."""

    def __init__(self, work: dist.Work | None, received: Tensor, *keep: Tensor):
        self._work, self._received, self._keep = work, received, keep

    def wait(self) -> Tensor:
        """The received tensor; on CUDA only the stream waits, not the host."""
        if self._work is not None:
            self._work.wait()
            self._work, self._keep = None, ()
        return self._received


class HeadExchange:
    """All-to-all between "all heads of my tokens" and "my heads of all tokens" within one Ulysses group.

    Args:
        group: process group of the ranks that exchange heads; None for a single rank.
        rank: rank within the group.
        layout: tokens of each rank of the group, as global ranges.
    """

    def __init__(self, group: dist.ProcessGroup | None, rank: int, layout: ShardLayout):
        self.group, self.rank, self.layout = group, rank, layout
        self._lengths = layout.lengths
        self._pieces = layout.in_global_order()
        self._in_rank_order = [piece[0] for piece in self._pieces] == sorted(piece[0] for piece in self._pieces)

    def to_heads(self, tensor: Tensor, heads: Sequence[tuple[int, int]]) -> Pending:
        """Start sending to each rank its heads of my tokens.

        Args:
            tensor: (B, my tokens, H, D).
            heads: range of heads for each rank; ranges may overlap or be empty.

        Returns:
            What :meth:`arrived` turns into (B, tokens of the group in global order, my heads, D).
        """
        if self.group is None:
            start, stop = heads[0]
            return Pending(None, tensor[:, :, start:stop])
        batch, tokens, _, head_dim = tensor.shape
        widths = [batch * (stop - start) * head_dim for start, stop in heads]
        send = torch.cat([tensor[:, :, start:stop].transpose(0, 1).reshape(-1) for start, stop in heads])
        mine = widths[self.rank]
        receive = tensor.new_empty(sum(self._lengths) * mine)
        work = dist.all_to_all_single(receive, send, [length * mine for length in self._lengths],
                                      [tokens * width for width in widths], group=self.group, async_op=True)
        start, stop = heads[self.rank]
        return Pending(work, receive.view(sum(self._lengths), batch, stop - start, head_dim), send)

    def arrived(self, pending: Pending) -> Tensor:
        """(B, tokens of the group in global order, my heads, D); a view unless shards interleave."""
        received = pending.wait()
        if self.group is None:
            return received
        if not self._in_rank_order:
            parts = received.split(self._lengths)
            received = torch.cat([parts[rank][start:stop] for rank, start, stop in self._pieces])
        return received.transpose(0, 1)

    def to_tokens(self, tensor: Tensor, heads: Sequence[tuple[int, int]]) -> Pending:
        """Start sending to each rank my heads of its tokens: the inverse of :meth:`to_heads`.

        Args:
            tensor: (B, tokens of the group in global order, my heads, D).
            heads: range of heads that each rank holds.
        """
        if self.group is None:
            return Pending(None, tensor)
        by_token = tensor.transpose(0, 1)
        if not self._in_rank_order:
            cut = dict(zip(self._pieces, by_token.split([stop - start for _, start, stop in self._pieces])))
            by_token = torch.cat([cut[piece] for piece in sorted(self._pieces)])
        send = by_token.reshape(-1)
        batch, _, mine, head_dim = tensor.shape
        tokens = self._lengths[self.rank]
        widths = [batch * (stop - start) * head_dim for start, stop in heads]
        receive = tensor.new_empty(tokens * sum(widths))
        work = dist.all_to_all_single(receive, send, [tokens * width for width in widths],
                                      [length * batch * mine * head_dim for length in self._lengths],
                                      group=self.group, async_op=True)
        return Pending(work, receive, send)

    def deliver(self, pending: Pending, into: Tensor, heads: Sequence[tuple[int, int]], add: bool = False) -> None:
        """Write what :meth:`to_tokens` brought into (B, my tokens, H, D), each rank's part into its range of heads.

        Args:
            add: sum into ``into``, for heads that several ranks hold a copy of.
        """
        received = pending.wait()
        if self.group is None:
            target = into[:, :, slice(*heads[0])]
            _ = target.add_(received) if add else target.copy_(received)
            return
        batch, tokens, _, head_dim = into.shape
        parts = received.split([tokens * batch * (stop - start) * head_dim for start, stop in heads])
        for (start, stop), part in zip(heads, parts):
            block = part.view(tokens, batch, stop - start, head_dim).transpose(0, 1)
            target = into[:, :, start:stop]
            _ = target.add_(block) if add else target.copy_(block)


def gather_shards(tensor: Tensor, dim: int, layout: ShardLayout, group: dist.ProcessGroup,
                  ranks: Sequence[int] | None = None) -> Tensor:
    """Concatenate every rank's shard along ``dim`` in global token order.

    Args:
        tensor: this rank's shard.
        dim: the token dimension.
        layout: tokens of each rank of the group.
        group: process group; its rank i holds ``layout.ranges[i]``.
        ranks: gather only these ranks' tokens into the result; default all.
    """
    lengths = layout.lengths
    tokens_first = tensor.movedim(dim, 0).contiguous()
    # bool is sent as bytes: not every backend of torch.distributed reduces or gathers bool.
    wire = tokens_first.view(torch.uint8) if tensor.dtype == torch.bool else tokens_first
    longest = max(lengths)
    padded = wire.new_zeros(longest, *wire.shape[1:])
    padded[:len(wire)] = wire
    gathered = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(gathered, padded, group=group)
    joined = torch.cat([gathered[rank][start:stop] for rank, start, stop in layout.in_global_order(ranks)])
    return (joined.view(torch.bool) if tensor.dtype == torch.bool else joined).movedim(0, dim)
