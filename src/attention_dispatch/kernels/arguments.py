"""What every kernel of this package needs from its arguments: views, strides, ranges, the lists of key blocks to visit."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .launch import facts, launch

LOG2_E = math.log2(math.e)
# In-tile offsets are 32-bit as long as a tile's last row stays below 2^31 elements; tiles have at most 256 rows.
_WIDE_STRIDE = 2**31 // 256


class KeyRange(NamedTuple):
    """Which keys a query sees by position: key j is visible to query i when i - left <= j <= i + right (-1: unbounded)."""

    left: int
    right: int

    @classmethod
    def of(cls, is_causal: bool, window_size: tuple[int, int]) -> KeyRange:
        left, right = window_size
        if is_causal:
            right = 0 if right < 0 else min(right, 0)
        return cls(left, right)


def blocks_of(length: int, block: int) -> int:
    """How many blocks hold `length`, rounded up. (triton.cdiv costs about 2 µs on the host, and a call needs ten of them.)"""
    return -(-length // block)


def padded_head_dim(head_dim: int) -> int:
    """The tile width for `head_dim`: the next power of two, at least 16 (the least that a tensor-core product takes)."""
    return max(16, 1 << (head_dim - 1).bit_length())


def check_inputs(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raises ValueError or TypeError, in words, for shapes and dtypes that no kernel here can take."""
    if not (query.dim() == key.dim() == value.dim() == 4):
        raise ValueError("query, key and value must be 4-D (batch, seq, heads, head_dim) tensors")
    if key.shape[:3] != value.shape[:3] or query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
        raise ValueError(
            f"shapes do not fit: query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
        )
    if query.shape[2] % key.shape[2]:
        raise ValueError(f"query heads ({query.shape[2]}) must be a multiple of key heads ({key.shape[2]})")
    if not (query.dtype == key.dtype == value.dtype):
        raise TypeError(f"query, key and value differ in dtype: {query.dtype}, {key.dtype}, {value.dtype}")
    if query.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise TypeError(f"{query.dtype} is not supported (supported: float16, bfloat16, float32)")
    if max(query.shape[3], value.shape[3]) > 256:
        raise ValueError(f"head_dim {max(query.shape[3], value.shape[3])} is not supported (at most 256)")


def broadcast_strides(tensor: Tensor | None, shape: tuple[int, int, int, int], name: str) -> tuple[int, int, int, int]:
    """Strides with which `tensor` reads as `shape`: 0 along each broadcast dimension, so that nothing is expanded."""
    if tensor is None:
        return (0, 0, 0, 0)
    if tensor.dim() != 4 or any(have not in (1, want) for have, want in zip(tensor.shape, shape)):
        raise ValueError(f"{name} of shape {tuple(tensor.shape)} does not broadcast to {shape}")
    strides = tuple(0 if have == 1 else step for have, step in zip(tensor.shape, tensor.stride()))
    return strides[0], strides[1], strides[2], strides[3]


def padding_strides(key_padding: Tensor | None, batch: int, seq_k: int) -> tuple[int, int]:
    """Strides of a (batch or 1, Sk) key-padding mask."""
    if key_padding is None:
        return (0, 0)
    if key_padding.dim() != 2 or key_padding.shape[0] not in (1, batch) or key_padding.shape[1] != seq_k:
        raise ValueError(f"key_padding of shape {tuple(key_padding.shape)} is not ({batch} or 1, {seq_k})")
    return (0 if key_padding.shape[0] == 1 else key_padding.stride(0)), key_padding.stride(1)


def as_bytes(mask: Tensor | None) -> Tensor | None:
    """A bool mask as a uint8 view, which is what kernels load."""
    return None if mask is None else mask.view(torch.uint8) if mask.dtype == torch.bool else mask


def needs_wide_offsets(*tensors: Tensor | None) -> bool:
    """Whether a row stride is so large that offsets inside one tile need 64 bits."""
    return any(step >= _WIDE_STRIDE for tensor in tensors if tensor is not None for step in tensor.stride())


def tma_ready(*tensors: Tensor) -> bool:
    """Whether Hopper's copy engine can read these tensors in place: unit last stride, 16-byte base and strides."""
    for tensor in tensors:
        width = tensor.element_size()
        if tensor.stride(-1) != 1 or tensor.data_ptr() % 16:
            return False
        if any(step * width % 16 or not 0 < step * width < 2**40 for step in tensor.stride()[:-1]):
            return False
    return True


def block_descriptor(tensor: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """A descriptor for (rows, columns) tiles of a BSHD tensor; what lies beyond seq or head_dim reads as zero."""
    batch, seq, heads, head_dim = tensor.shape
    step_b, step_s, step_h, step_d = tensor.stride()
    return TensorDescriptor(
        tensor, [batch, heads, seq, head_dim], [step_b, step_h, step_s, step_d], [1, 1, rows, columns]
    )


def is_hopper_or_newer(device: torch.device) -> bool:
    """Whether the device has the bulk tensor copy engine."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


@triton.jit
def list_key_blocks_kernel(
    key_padding, lists, counts, stride_b, stride_n, seq_k, num_blocks, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr
):
    """One program per batch row: which key blocks are fully visible, which partly; see list_key_blocks."""
    batch = tl.program_id(0)
    key_padding += batch.to(tl.int64) * stride_b
    full_list = lists + batch * 2 * num_blocks
    partial_list = full_list + num_blocks
    full_counts = counts + batch * 2 * (num_blocks + 1)
    partial_counts = full_counts + num_blocks + 1
    tl.store(full_counts, 0)
    tl.store(partial_counts, 0)
    full_total = 0
    partial_total = 0
    for first in range(0, num_blocks, CHUNK):
        blocks = first + tl.arange(0, CHUNK)
        keys = blocks[:, None].to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        # (CHUNK, BLOCK_N); a block that reaches past the sequence counts as partial, so its tail gets masked
        visible = tl.load(key_padding + keys * stride_n, mask=keys < seq_k, other=0).to(tl.int32)
        visible_keys = tl.sum((visible != 0).to(tl.int32), axis=1)
        is_full = (visible_keys == BLOCK_N).to(tl.int32)
        is_partial = ((visible_keys > 0) & (visible_keys < BLOCK_N)).to(tl.int32)
        full_rank = full_total + tl.cumsum(is_full, axis=0)
        partial_rank = partial_total + tl.cumsum(is_partial, axis=0)
        inside = blocks < num_blocks
        tl.store(full_list + full_rank - 1, blocks, mask=inside & (is_full == 1))
        tl.store(partial_list + partial_rank - 1, blocks, mask=inside & (is_partial == 1))
        tl.store(full_counts + 1 + blocks, full_rank, mask=inside)
        tl.store(partial_counts + 1 + blocks, partial_rank, mask=inside)
        full_total += tl.sum(is_full, axis=0)
        partial_total += tl.sum(is_partial, axis=0)


def list_key_blocks(key_padding: Tensor, block_n: int) -> tuple[Tensor, Tensor]:
    """The key blocks worth visiting under a key-padding mask, so that kernels skip the rest.

    Returns int32 `lists` (B or 1, 2, blocks): ascending numbers of the fully visible blocks, then of the partly visible
    ones; and `counts` (B or 1, 2, blocks + 1): how many of each kind come before a given block.
    """
    batch, seq_k = key_padding.shape
    num_blocks = blocks_of(seq_k, block_n)
    lists = torch.empty((batch, 2, num_blocks), dtype=torch.int32, device=key_padding.device)
    counts = torch.empty((batch, 2, num_blocks + 1), dtype=torch.int32, device=key_padding.device)
    launch(
        list_key_blocks_kernel, (batch,), key_padding.device, (facts(key_padding), block_n),
        (as_bytes(key_padding), lists, counts, *key_padding.stride(), seq_k, num_blocks),
        {"BLOCK_N": block_n, "CHUNK": 32}, {},
    )  # fmt: skip
    return lists, counts
