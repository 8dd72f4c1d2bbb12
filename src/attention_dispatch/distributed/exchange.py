"""Collectives of context parallelism: heads against tokens (all-to-all) and gathering shards of unequal length.

Buffers are laid out with tokens first. A receive buffer is then already the sequence of the group in rank order, for
any batch size, and becomes (B, S, H, D) by a transpose that copies nothing. A kernel's output of batch 1 is sent from
where it lies.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

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
        table.append(
            [
                HeadRange(rank.q_start + a * group, rank.q_start + b * group, rank.kv_start + a, rank.kv_start + b)
                for a, b in itertools.pairwise(edges)
            ]
        )
    return tuple(zip(*table))


def _edges(total: int, parts: int) -> list[int]:
    size, rest = divmod(total, parts)
    return [part * size + min(part, rest) for part in range(parts + 1)]


class Message(NamedTuple):
    """One tensor on its way between all ranks of a group.

    Attributes:
        ops: the transfers to post.
        received: what they fill: one tensor, or one for each rank.
        keep: what is being sent, alive until it has left.
    """

    ops: list[dist.P2POp]
    received: Any
    keep: list[Tensor]


class Pending:
    """Messages that were posted together."""

    def __init__(self, messages: Sequence[Message]):
        ops = [op for message in messages for op in message.ops]
        self._works = dist.batch_isend_irecv(ops) if ops else []
        self._keep = [message.keep for message in messages]
        self._received = [message.received for message in messages]

    def wait(self) -> list[Any]:
        """What each message received; on CUDA only the stream waits, not the host."""
        for work in self._works:
            work.wait()
        self._works, self._keep = [], []
        return self._received


class HeadExchange:
    """All-to-all between "all heads of my tokens" and "my heads of all tokens" within one Ulysses group.

    It is made of transfers between pairs of ranks, so that several tensors travel in one collective and what stays on a
    rank is copied once, from its place to its place.

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
        self._peers = []
        if group is not None:
            self._peers = [(peer, dist.get_global_rank(group, peer)) for peer in range(layout.world) if peer != rank]

    def to_heads(self, tensor: Tensor, heads: Sequence[tuple[int, int]], tag: int) -> Message:
        """Send to each rank its heads of my tokens.

        Args:
            tensor: (B, my tokens, H, D).
            heads: range of heads for each rank; ranges may overlap or be empty.
            tag: tells this message from others that are under way between the same ranks.

        Returns:
            What :meth:`in_global_order` turns into (B, tokens of the group in global order, my heads, D) on arrival.
        """
        start, stop = heads[self.rank]
        if self.group is None:
            return Message([], tensor[:, :, start:stop], [])
        batch, _, _, head_dim = tensor.shape
        received = tensor.new_empty(sum(self._lengths), batch, stop - start, head_dim)
        parts = received.split(self._lengths)
        keep, ops = [], []
        for peer, global_rank in self._peers:
            sent = tensor[:, :, slice(*heads[peer])].transpose(0, 1).contiguous()
            keep.append(sent)
            ops += _both(sent, parts[peer], global_rank, self.group, tag)
        parts[self.rank].copy_(tensor[:, :, start:stop].transpose(0, 1))
        return Message(ops, received, keep)

    def in_global_order(self, received: Tensor) -> Tensor:
        """(B, tokens of the group in global order, my heads, D); a view unless shards interleave."""
        if self.group is None:
            return received
        if not self._in_rank_order:
            parts = received.split(self._lengths)
            received = torch.cat([parts[rank][start:stop] for rank, start, stop in self._pieces])
        return received.transpose(0, 1)

    def to_tokens(self, tensor: Tensor, heads: Sequence[tuple[int, int]], tag: int) -> Message:
        """Send to each rank my heads of its tokens: the inverse of :meth:`to_heads`.

        Args:
            tensor: (B, tokens of the group in global order, my heads, D).
            heads: range of heads that each rank holds.
            tag: as in :meth:`to_heads`.

        Returns:
            What :meth:`deliver` writes on arrival.
        """
        if self.group is None:
            return Message([], [tensor.transpose(0, 1)], [])
        by_token = tensor.transpose(0, 1)
        if not self._in_rank_order:
            cut = dict(zip(self._pieces, by_token.split([stop - start for _, start, stop in self._pieces])))
            by_token = torch.cat([cut[piece] for piece in sorted(self._pieces)])
        batch, _, _, head_dim = tensor.shape
        received = list(by_token.split(self._lengths))
        keep, ops = [], []
        for peer, global_rank in self._peers:
            sent = received[peer].contiguous()
            start, stop = heads[peer]
            received[peer] = tensor.new_empty(self._lengths[self.rank], batch, stop - start, head_dim)
            keep.append(sent)
            ops += _both(sent, received[peer], global_rank, self.group, tag)
        return Message(ops, received, keep)

    def deliver(
        self, received: Sequence[Tensor], into: Tensor, heads: Sequence[tuple[int, int]], add: bool = False
    ) -> None:
        """Write what :meth:`to_tokens` brought into (B, my tokens, H, D), each rank's part into its range of heads.

        Args:
            add: sum into ``into``, for heads that several ranks hold a copy of.
        """
        for (start, stop), part in zip(heads, received):
            target, block = into[:, :, start:stop], part.transpose(0, 1)
            _ = target.add_(block) if add else target.copy_(block)


def _both(sent: Tensor, received: Tensor, peer: int, group: dist.ProcessGroup, tag: int) -> list[dist.P2POp]:
    """The transfers with one rank; empty tensors are not sent, which both sides know from their shapes."""
    ops = [dist.P2POp(dist.isend, sent, peer, group, tag)] if sent.numel() else []
    return ops + ([dist.P2POp(dist.irecv, received, peer, group, tag)] if received.numel() else [])


def gather_shards(
    tensor: Tensor, dim: int, layout: ShardLayout, group: dist.ProcessGroup, ranks: Sequence[int] | None = None
) -> Tensor:
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
    padded[: len(wire)] = wire
    gathered = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(gathered, padded, group=group)
    joined = torch.cat([gathered[rank][start:stop] for rank, start, stop in layout.in_global_order(ranks)])
    return (joined.view(torch.bool) if tensor.dtype == torch.bool else joined).movedim(0, dim)
