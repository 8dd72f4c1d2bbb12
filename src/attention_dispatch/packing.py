"""Packing of keys for kernels that take sequences end to end instead of a key-padding mask.

Kept keys of all samples move to the front, in order; the tensors keep their size, so that nothing waits for the device
to count. A kernel reads ``starts`` and never looks at the rest.
"""

from __future__ import annotations

import contextlib
import functools
from typing import NamedTuple

import torch
from torch import Tensor

from . import adapt
from .call import AttentionCall
from .masks import Mask, derived


class PackedKeys(NamedTuple):
    """Where the kept keys of a key-padding mask go. B samples of K keys.

    Attributes:
        order: int64 (B * K,): rows of the flattened keys, kept ones first.
        starts: int32 (B + 1,): where each sample begins among the kept ones; the last entry is their number.
        kept: bool (B * K,): whether a packed row holds a kept key.
        empty: bool (B,): samples without a key.
    """

    order: Tensor
    starts: Tensor
    kept: Tensor
    empty: Tensor


def _packed_key_bytes(call: AttentionCall) -> int:
    return call.key.numel() * call.key.element_size() + call.value.numel() * call.value.element_size()


adapt.ADAPTERS["pack_keys"] = adapt.Adapter("moves the kept keys and values to the front", _packed_key_bytes)


def pack_keys(mask: Tensor, batch: int) -> PackedKeys:
    """Packing of a key-padding mask, bool (B or 1, K); computed once per mask object, without synchronising."""

    def build() -> PackedKeys:
        with _ordinary_tensors():
            return _pack(mask.expand(batch, -1))

    return derived(mask, ("packed", batch), build)


def _pack(mask: Tensor) -> PackedKeys:
    batch, length = mask.shape
    flat = mask.reshape(-1)
    counts = mask.sum(1)
    ends = counts.cumsum(0)
    starts = torch.cat([ends.new_zeros(1), ends]).to(torch.int32)
    rows = torch.arange(batch * length, device=mask.device)
    kept_before = flat.cumsum(0) - 1
    target = torch.where(flat, kept_before, ends[-1] + rows - kept_before - 1)
    order = torch.zeros_like(rows).scatter(0, target, rows)
    return PackedKeys(order, starts, rows < ends[-1], counts == 0)


def packed(tensor: Tensor, packing: PackedKeys) -> Tensor:
    """(B, K, G, D) as (B * K, G, D), kept keys first.

    A kernel leaves the gradients of rows that no sequence covers unwritten; they come out as zero here.
    """
    rows = tensor.flatten(0, 1).index_select(0, packing.order)
    if torch.is_grad_enabled() and rows.requires_grad:
        rows = torch.where(packing.kept[:, None, None], rows, 0.0)
    return rows


class Sequences(NamedTuple):
    """A call laid end to end: q (B * Q, H, D), k and v (B * K, G, D), int32 starts, and samples without a key."""

    query: Tensor
    key: Tensor
    value: Tensor
    query_starts: Tensor
    key_starts: Tensor
    empty: Tensor | None


def sequences(query: Tensor, key: Tensor, value: Tensor, mask: Mask | None) -> Sequences:
    """BSHD tensors as packed sequences; with a key-padding mask, of the kept keys only."""
    batch, q_len, _, _ = query.shape
    query_starts = uniform_starts(batch, q_len, query.device)
    query = query.flatten(0, 1)
    if mask is None:
        key_starts = uniform_starts(batch, key.shape[1], key.device)
        return Sequences(query, key.flatten(0, 1), value.flatten(0, 1), query_starts, key_starts, None)
    assert mask.tensor is not None
    keys = pack_keys(mask.tensor, batch)
    return Sequences(query, packed(key, keys), packed(value, keys), query_starts, keys.starts, keys.empty)


def uniform_starts(batch: int, length: int, device: torch.device) -> Tensor:
    """int32 (B + 1,): 0, length, 2 * length, …"""
    if torch.compiler.is_compiling():
        return _uniform_starts.__wrapped__(batch, length, device)
    return _uniform_starts(batch, length, device)


@functools.lru_cache(maxsize=256)
def _uniform_starts(batch: int, length: int, device: torch.device) -> Tensor:
    with _ordinary_tensors():
        return torch.arange(batch + 1, dtype=torch.int32, device=device) * length


def _ordinary_tensors() -> contextlib.AbstractContextManager:
    """What is remembered must serve training as well: a tensor made in inference mode cannot be saved for backward."""
    if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
        return contextlib.nullcontext()
    return torch.inference_mode(False)
