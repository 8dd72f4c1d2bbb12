"""All ranks agree on a call before any of its tensors moves, and on its success before any of them returns.

Both steps are small collectives on a gloo group of the same ranks, so they never wait for a GPU: while they run, the
GPU works on what was queued before. A rank that refuses or fails says so here, and every rank raises. A rank that has
died or left is noticed when its connection closes, or after the group's timeout.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist

from ..errors import AttentionDispatchError, InvalidCallError

T = TypeVar("T")

# Facts that legitimately differ between ranks.
_PER_RANK = frozenset({"query_tokens", "key_tokens", "mask_size_0", "mask_size_1", "mask_size_2", "mask_size_3"})


class PeerError(AttentionDispatchError):
    """Another rank of the group refused or failed; the message says which rank and why."""


class CallFacts(NamedTuple):
    """What every rank tells the others about its call, as integers."""

    batch: int
    query_tokens: int
    key_tokens: int
    query_heads: int
    key_heads: int
    head_dim: int
    value_head_dim: int
    dtype: int
    is_causal: int
    window_left: int
    window_right: int
    scale: int
    softcap: int
    deterministic: int
    return_lse: int
    needs_grad: int
    mask_dims: int
    mask_size_0: int
    mask_size_1: int
    mask_size_2: int
    mask_size_3: int
    mask_dtype: int
    layout: int
    head_chunks: int
    backend: int

    @property
    def mask_sizes(self) -> tuple[int, ...]:
        """Shape of this rank's mask."""
        return (self.mask_size_0, self.mask_size_1, self.mask_size_2, self.mask_size_3)[: self.mask_dims]


def float_bits(value: float) -> int:
    """A float as the integer with the same 64 bits: compared exactly, sent as an integer."""
    return struct.unpack("<q", struct.pack("<d", value))[0]


class Failures:
    """Keeps the first exception of a computation whose communication has to go on.

    A rank that stopped sending would leave its neighbours waiting, so the ring and the all-to-alls are finished with
    whatever there is, and :meth:`Agreement.close` raises afterwards.
    """

    def __init__(self) -> None:
        self.error: Exception | None = None

    def run(self, function: Callable[..., T], *args: object) -> T | None:
        """``function(*args)``, or None once something failed."""
        if self.error is not None:
            return None
        try:
            return function(*args)
        except Exception as error:
            self.error = error
            return None


class Agreement:
    """The agreement steps of one group of ranks.

    Args:
        ranks: global ranks of the group, in the order of its shards.
        timeout: how long to wait for a rank that does not answer; None is the default of torch.distributed.
    """

    def __init__(self, ranks: Sequence[int], timeout: timedelta | None = None):
        self.size = len(ranks)
        self._group = None
        if self.size > 1:
            self._group = dist.new_group(list(ranks), backend="gloo", timeout=timeout, use_local_synchronization=True)
            self._rank = dist.get_rank(self._group)

    def open(self, facts: CallFacts | None, error: Exception | None) -> tuple[CallFacts, ...]:
        """Every rank's facts.

        Args:
            facts: of this rank's call; None if it was refused.
            error: why it was refused.

        Raises:
            InvalidCallError: the ranks were given calls that differ.
            PeerError: another rank refused. The refusing rank raises its own error.
        """
        if self._group is None:
            if error is not None:
                raise error
            assert facts is not None
            return (facts,)
        mine = torch.tensor([0, *facts] if facts is not None else [1] + [0] * len(CallFacts._fields), device="cpu")
        gathered = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(gathered, mine, group=self._group)
        rows = [row.tolist() for row in gathered]
        if any(row[0] for row in rows):
            self._raise(error)
        calls = tuple(CallFacts(*row[1:]) for row in rows)
        for name in CallFacts._fields:
            values = [getattr(call, name) for call in calls]
            if name not in _PER_RANK and len(set(values)) > 1:
                raise InvalidCallError(
                    f"the ranks of a context-parallel group were given different calls: {name} differs.\n"
                    f"  Why:   by rank: {values}\n"
                    "  Do:    make the same call with the same options on every rank; only the numbers of tokens may "
                    "differ."
                )
        return calls

    def close(self, error: Exception | None) -> None:
        """Raise on every rank if any has an error; see :meth:`open`."""
        if self._group is None:
            if error is not None:
                raise error
            return
        failed = torch.tensor([int(error is not None)], device="cpu")
        dist.all_reduce(failed, dist.ReduceOp.MAX, group=self._group)
        if failed.item():
            self._raise(error)

    def first(self, value: T) -> T:
        """Rank 0's value, on every rank. The value must be picklable."""
        if self._group is None:
            return value
        values: list = [value]
        dist.broadcast_object_list(values, dist.get_global_rank(self._group, 0), group=self._group)
        return values[0]

    def all(self, value: T) -> list[T]:
        """Every rank's value. The value must be picklable."""
        if self._group is None:
            return [value]
        values: list = [None] * self.size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def _raise(self, error: Exception | None) -> None:
        texts = self.all(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        told = "\n".join(f"  rank {rank}: {text}" for rank, text in enumerate(texts) if text)
        raise PeerError(
            f"context-parallel attention stopped on every rank because another rank could not go on.\n{told}\n"
            "  Do:    resolve the error of that rank; nothing has to be changed on this one."
        )
