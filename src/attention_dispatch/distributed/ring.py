"""Rotation around a ring of ranks: keys and values one way, their gradients behind them.

Every transfer is between neighbours and is posted before the kernel that it overlaps with. A rank holds its own keys
and values, the visiting ones, and the ones on their way in: never those of all ranks.
(Liu, Zaharia, Abbeel, https://arxiv.org/abs/2310.01889)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

# Message tags, so that keys, values and their gradients in flight at once cannot be taken for each other.
_FORWARD_TAGS, _GRADIENT_TAGS = (1, 2), (3, 4)


class Ring:
    """The ranks of one ring and how many tokens each contributes.

    Args:
        group: process group of the ring; None for a single rank.
        rank: rank within the group.
        lengths: key tokens of each rank of the ring.
    """

    def __init__(self, group: dist.ProcessGroup | None, rank: int, lengths: Sequence[int]):
        self.group, self.rank, self.lengths = group, rank, tuple(lengths)
        self.size = len(self.lengths)
        if group is not None:
            self._next = dist.get_global_rank(group, (rank + 1) % self.size)
            self._previous = dist.get_global_rank(group, (rank - 1) % self.size)

    def source(self, step: int) -> int:
        """Ring rank whose keys are here at this step."""
        return (self.rank - step) % self.size

    def shift(self, tensors: Sequence[Tensor], source: int, tags: Sequence[int]) -> Transfer:
        """Send tensors (B, S, ...) to the next rank and receive those of ``source`` from the previous one."""
        length = self.lengths[source]
        received = [t.new_empty(t.shape[0], length, *t.shape[2:]) for t in tensors]
        sent = [t.contiguous() for t in tensors]
        ops = [dist.P2POp(dist.isend, t, self._next, self.group, tag) for t, tag in zip(sent, tags) if t.numel()]
        ops += [dist.P2POp(dist.irecv, t, self._previous, self.group, tag)
                for t, tag in zip(received, tags) if t.numel()]
        return Transfer(dist.batch_isend_irecv(ops) if ops else [], sent, received)


class Transfer:
    """Tensors on their way; keeps what is being sent alive until it has left."""

    def __init__(self, works: Sequence[dist.Work], sent: Sequence[Tensor], received: Sequence[Tensor]):
        self._works, self._sent, self._received = works, sent, received

    def wait(self) -> Sequence[Tensor]:
        """The received tensors; on CUDA only the stream waits, not the host."""
        for work in self._works:
            work.wait()
        self._works, self._sent = (), ()
        return self._received


class KeyValueRotation:
    """Keys and values passing through this rank. Creating it posts the first transfer."""

    def __init__(self, ring: Ring, key: Tensor, value: Tensor):
        self._ring = ring
        self.held: Sequence[Tensor] = (key, value)
        self.step = 0
        self._transfer: Transfer | None = None
        self._post()

    @property
    def source(self) -> int:
        """Ring rank that the held keys and values belong to."""
        return self._ring.source(self.step)

    def _post(self) -> None:
        if self.step + 1 < self._ring.size:
            self._transfer = self._ring.shift(self.held, self._ring.source(self.step + 1), _FORWARD_TAGS)

    def advance(self) -> None:
        """Take the arriving keys and values and pass them on at once, before anything is computed with them."""
        assert self._transfer is not None
        self.held = self._transfer.wait()
        self._transfer = None
        self.step += 1
        self._post()


class GradientRotation:
    """Sums of dk and dv that follow their keys and values around the ring and end at the owner.

    The sums travel in the accumulation dtype, so that N contributions are rounded once.
    """

    def __init__(self, ring: Ring):
        self._ring = ring
        self._step = 0
        self._transfer: Transfer | None = None

    def add(self, d_key: Tensor, d_value: Tensor) -> None:
        """Add this rank's contribution for the keys of the current step, and send the sums on."""
        sums: Sequence[Tensor] = (d_key, d_value)
        if self._transfer is not None:
            sums = self._transfer.wait()
            sums[0].add_(d_key)
            sums[1].add_(d_value)
        self._step += 1
        if self._ring.size > 1:
            self._transfer = self._ring.shift(sums, self._ring.source(self._step), _GRADIENT_TAGS)
        else:
            self._own = sums

    def result(self) -> tuple[Tensor, Tensor]:
        """Complete ``(dk, dv)`` of this rank's own keys and values, after every step was added."""
        d_key, d_value = self._own if self._transfer is None else self._transfer.wait()
        self._transfer = None
        return d_key, d_value


def empty_gradients(key: Tensor, value: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Zero sums for dk and dv."""
    return torch.zeros_like(key, dtype=dtype), torch.zeros_like(value, dtype=dtype)
