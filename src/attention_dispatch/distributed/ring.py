"""Rotation around a ring of ranks: keys and values one way, their gradients behind them.

Every transfer is between neighbours and is posted before the kernel that it overlaps with. A rank holds its own keys
and values, the visiting ones, and the ones on their way in: never those of all ranks.
(Liu, Zaharia, Abbeel, https://arxiv.org/abs/2310.01889)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

# Message tags, so that keys with values and their gradients in flight at once cannot be taken for each other.
_FORWARD_TAG, _GRADIENT_TAG = 1, 2
# Elements to which each tensor of a buffer is aligned: 128 bytes or more, as kernels and TMA want their operands.
_ALIGNMENT = 64


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

    def shift(self, flat: Tensor, received: Tensor, tag: int) -> Transfer:
        """Send a buffer to the next rank and receive one from the previous rank; buffers without elements stay."""
        assert self.group is not None
        ops = [dist.P2POp(dist.isend, flat, self._next, self.group, tag)] if flat.numel() else []
        if received.numel():
            ops.append(dist.P2POp(dist.irecv, received, self._previous, self.group, tag))
        return Transfer(dist.batch_isend_irecv(ops) if ops else [], flat)


class Transfer:
    """A buffer on its way; keeps what is being sent alive until it has left."""

    def __init__(self, works: Sequence[dist.Work], sent: Tensor):
        self._works, self._sent = works, [sent]

    def wait(self) -> None:
        """Wait for both directions; on CUDA only the stream waits, not the host."""
        for work in self._works:
            work.wait()
        self._works, self._sent = (), []


class Parcel(NamedTuple):
    """Two tensors in one buffer, so that they travel as one message."""

    flat: Tensor
    parts: tuple[Tensor, Tensor]

    @classmethod
    def empty(cls, like: Sequence[Tensor], tokens: int, dtype: torch.dtype | None = None) -> Parcel:
        """Room for tensors (B, S, ...) like the given ones, with another number of tokens."""
        shapes = [(tensor.shape[0], tokens, *tensor.shape[2:]) for tensor in like]
        sizes = [math.prod(shape) for shape in shapes]
        padded = [-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes]
        flat = like[0].new_empty(sum(padded), dtype=dtype)
        first, second = (part[:size].view(shape) for part, size, shape in zip(flat.split(padded), sizes, shapes))
        return cls(flat, (first, second))


class KeyValueRotation:
    """Keys and values passing through this rank. Creating it posts the first transfer."""

    def __init__(self, ring: Ring, key: Tensor, value: Tensor):
        self._ring = ring
        self.held: tuple[Tensor, Tensor] = (key, value)
        self.step = 0
        self._flat: Tensor | None = None
        self._transfer: Transfer | None = None
        self._post()

    @property
    def source(self) -> int:
        """Ring rank that the held keys and values belong to."""
        return self._ring.source(self.step)

    def _post(self) -> None:
        if self.step + 1 == self._ring.size:
            return
        if self._flat is None:
            own = Parcel.empty(self.held, self.held[0].shape[1])
            for packed, tensor in zip(own.parts, self.held):
                packed.copy_(tensor)
            self._flat = own.flat
        self._arriving = Parcel.empty(self.held, self._ring.lengths[self._ring.source(self.step + 1)])
        self._transfer = self._ring.shift(self._flat, self._arriving.flat, _FORWARD_TAG)

    def advance(self) -> None:
        """Take the arriving keys and values and pass them on at once, before anything is computed with them."""
        assert self._transfer is not None
        self._transfer.wait()
        self._transfer = None
        self._flat, self.held = self._arriving
        del self._arriving
        self.step += 1
        self._post()


class GradientRotation:
    """Sums of dk and dv that follow their keys and values around the ring and end at the owner.

    The sums travel in the accumulation dtype, so that N contributions are rounded once.
    """

    def __init__(self, ring: Ring):
        self._ring = ring
        self._step = 0
        self._sums: Parcel | None = None
        self._transfer: Transfer | None = None

    def add(self, contribution: Parcel) -> None:
        """Add this rank's contribution for the keys of the current step, and send the sums on."""
        sums = self._arrived()
        if sums is None:
            sums = contribution
        else:
            sums.flat.add_(contribution.flat)
        self._step += 1
        if self._ring.size > 1:
            self._sums = Parcel.empty(sums.parts, self._ring.lengths[self._ring.source(self._step)])
            self._transfer = self._ring.shift(sums.flat, self._sums.flat, _GRADIENT_TAG)
        else:
            self._sums = sums

    def result(self) -> tuple[Tensor, Tensor]:
        """Complete ``(dk, dv)`` of this rank's own keys and values, after every step was added."""
        sums = self._arrived()
        assert sums is not None
        return sums.parts

    def _arrived(self) -> Parcel | None:
        if self._transfer is not None:
            self._transfer.wait()
            self._transfer = None
        return self._sums


def empty_gradients(key: Tensor, value: Tensor, dtype: torch.dtype) -> Parcel:
    """Zero sums for dk and dv."""
    sums = Parcel.empty((key, value), key.shape[1], dtype)
    sums.flat.zero_()
    return sums
