"""The order in which chunks of heads and the keys of other ranks come by."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch import Tensor

from .exchange import Pending
from .ring import KeyValueRotation, Ring


class Visit(NamedTuple):
    """One step of one chunk of heads: the chunk's own tensors and the keys and values that are here now.

    Attributes:
        chunk: index of the chunk.
        own: tensors of the chunk; the first three are query, key, value of this ring position.
        key, value: of ring position ``source``.
        is_last: no more keys will come for this chunk.
    """

    chunk: int
    own: tuple[Tensor, ...]
    key: Tensor
    value: Tensor
    source: int
    is_last: bool


def visits(
    ring: Ring,
    chunks: int,
    depart: Callable[[int], Pending],
    arrive: Callable[[int, Pending], tuple[Tensor, ...]],
) -> Iterator[Visit]:
    """All steps of all chunks of heads; between two of them the caller computes on what it was given.

    What a step needs is posted before the computation of the step before it, across chunks too.

    Args:
        ring: of this rank.
        chunks: their number.
        depart: starts the exchange of a chunk's tokens for heads.
        arrive: the tensors of a chunk from that; the second and third are key and value.
    """
    own = arrive(0, depart(0))
    rotation = KeyValueRotation(ring, own[1], own[2])
    for chunk in range(chunks):
        following = depart(chunk + 1) if chunk + 1 < chunks else None
        upcoming = None
        for step in range(ring.size):
            if step:
                rotation.advance()
            is_last = step == ring.size - 1
            if step and is_last and following is not None:
                next_own = arrive(chunk + 1, following)
                upcoming = KeyValueRotation(ring, next_own[1], next_own[2])
            held_key, held_value = rotation.held
            yield Visit(chunk, own, held_key, held_value, rotation.source, is_last)
        if following is None:
            return
        if upcoming is None:
            next_own = arrive(chunk + 1, following)
            upcoming = KeyValueRotation(ring, next_own[1], next_own[2])
        own, rotation = next_own, upcoming
