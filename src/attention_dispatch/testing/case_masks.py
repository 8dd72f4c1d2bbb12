"""Masks of the conformance cases: what is passed to a call, and independently of it what it means.

Shape legend: B batch, H query heads, Q query length, K key length. True means "attend".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask


class MaskInput(NamedTuple):
    """A mask as an argument and as a meaning.

    Attributes:
        argument: what ``attn_mask`` gets.
        keep: bool, broadcastable to (B, H, Q, K), or None: everything is visible.
        bias: floating, broadcastable to (B, H, Q, K), added to the scores, or None. ``argument`` is a view of it, so
            that gradients of both can be compared.
    """

    argument: Any
    keep: Tensor | None = None
    bias: Tensor | None = None


class MaskShape(NamedTuple):
    """The sizes a mask is made for."""

    batch: int
    heads: int
    q_len: int
    k_len: int
    dtype: torch.dtype
    device: torch.device


_BLOCK = 16


def _random_keep(shape: tuple[int, ...], generator: torch.Generator, first_key: bool = True) -> Tensor:
    keep = torch.rand(shape, generator=generator) < 0.6
    if first_key:
        keep[..., 0] = True
    return keep


def _padding(kind: str) -> Callable[[MaskShape, torch.Generator], MaskInput]:
    def make(shape: MaskShape, generator: torch.Generator) -> MaskInput:
        columns = torch.arange(shape.k_len)[None, :]
        lengths = torch.tensor([max(1, shape.k_len * (row + 1) // (shape.batch + 1)) for row in range(shape.batch)])
        if kind == "right":
            keep = columns < lengths[:, None]
        elif kind == "left":
            keep = columns >= shape.k_len - lengths[:, None]
        elif kind == "interior":
            keep = (columns < lengths[:, None] // 2) | (columns >= shape.k_len - lengths[:, None] // 2 - 1)
        else:
            keep = _random_keep((shape.batch, shape.k_len), generator)
        if kind == "empty":
            keep[0] = False
        keep = keep.to(shape.device)
        argument = keep if kind == "right" else keep[:, None, None, :]
        if kind == "left":
            argument = argument.expand(-1, shape.heads, shape.q_len, -1)
        return MaskInput(argument, keep[:, None, None, :])

    return make


def _bool(*pattern: str, empty: bool = False, ndim: int = 4) -> Callable[[MaskShape, torch.Generator], MaskInput]:
    """A bool mask of the dims named in ``pattern`` (of B, H, Q, K); the others are broadcast."""

    def make(shape: MaskShape, generator: torch.Generator) -> MaskInput:
        keep = _random_keep(_sizes(shape, pattern), generator, first_key=not empty)
        if empty:
            keep[:, :, :: max(2, shape.q_len // 3)] = False
            keep[-1, -1, -1] = False
        keep = keep.to(shape.device)
        return MaskInput(_with_ndim(keep, ndim), keep)

    return make


def _bias(
    *pattern: str, infinite: bool = False, ndim: int = 4, dtype: torch.dtype | None = None
) -> Callable[[MaskShape, torch.Generator], MaskInput]:
    def make(shape: MaskShape, generator: torch.Generator) -> MaskInput:
        bias = torch.randn(_sizes(shape, pattern), generator=generator)
        if infinite:
            bias = bias.masked_fill(torch.rand(bias.shape, generator=generator) < 0.3, float("-inf"))
            bias[:, :, :: max(2, shape.q_len // 3)] = float("-inf")
        bias = bias.to(shape.device, dtype or shape.dtype)
        return MaskInput(_with_ndim(bias, ndim), None, bias)

    return make


def _sizes(shape: MaskShape, pattern: tuple[str, ...]) -> tuple[int, int, int, int]:
    full = {"B": shape.batch, "H": shape.heads, "Q": shape.q_len, "K": shape.k_len}
    batch, heads, rows, columns = (full[dim] if dim in pattern else 1 for dim in "BHQK")
    return batch, heads, rows, columns


def _with_ndim(mask: Tensor, ndim: int) -> Tensor:
    if ndim == 2:
        return mask[0, 0]
    return mask[:, 0] if ndim == 3 else mask


def _all_true(shape: MaskShape, generator: torch.Generator) -> MaskInput:
    return MaskInput(torch.ones(shape.batch, 1, shape.q_len, shape.k_len, dtype=torch.bool, device=shape.device))


def _all_zero(shape: MaskShape, generator: torch.Generator) -> MaskInput:
    return MaskInput(torch.zeros(shape.batch, 1, 1, shape.k_len, dtype=shape.dtype, device=shape.device))


def _block_documents(shape: MaskShape, generator: torch.Generator) -> MaskInput:
    """Queries see the keys of their own document; the same for all heads and samples."""
    document = (torch.arange(max(shape.q_len, shape.k_len)) * 3 // max(shape.q_len, shape.k_len)).to(shape.device)
    mask = create_block_mask(
        lambda b, h, q, k: document[q] == document[k],
        None,
        None,
        shape.q_len,
        shape.k_len,
        device=shape.device,
        BLOCK_SIZE=128 if shape.device.type == "cuda" else _BLOCK,
    )
    return MaskInput(mask, document[: shape.q_len, None] == document[None, : shape.k_len])


def _block_per_head(shape: MaskShape, generator: torch.Generator) -> MaskInput:
    """Head h of sample b sees the keys at a distance of at most 3 + h + 2b."""
    mask = create_block_mask(
        lambda b, h, q, k: (q - k).abs() <= 3 + h + 2 * b,
        shape.batch,
        shape.heads,
        shape.q_len,
        shape.k_len,
        device=shape.device,
        BLOCK_SIZE=128 if shape.device.type == "cuda" else _BLOCK,
    )
    rows = torch.arange(shape.q_len, device=shape.device)[:, None]
    columns = torch.arange(shape.k_len, device=shape.device)[None, :]
    reach = (
        3
        + torch.arange(shape.heads, device=shape.device)[None, :, None, None]
        + 2 * torch.arange(shape.batch, device=shape.device)[:, None, None, None]
    )
    return MaskInput(mask, (rows - columns).abs() <= reach)


def _block_table(shape: MaskShape, generator: torch.Generator) -> MaskInput:
    """Whole blocks listed by the caller, without a mask_mod: each row of blocks sees one."""
    block = 128 if shape.device.type == "cuda" else _BLOCK
    rows, columns = -(-shape.q_len // block), -(-shape.k_len // block)
    listed = [[row % columns] for row in range(rows)]
    counts = torch.tensor([len(row) for row in listed], dtype=torch.int32)
    indices = torch.tensor([row + [c for c in range(columns) if c not in row] for row in listed], dtype=torch.int32)
    mask = BlockMask.from_kv_blocks(
        counts[None, None].to(shape.device),
        indices[None, None].to(shape.device),
        BLOCK_SIZE=block,
        seq_lengths=(shape.q_len, shape.k_len),
    )
    keep = torch.zeros(shape.q_len, shape.k_len, dtype=torch.bool)
    for row, visited in enumerate(listed):
        for column in visited:
            keep[row * block : (row + 1) * block, column * block : (column + 1) * block] = True
    return MaskInput(mask, keep.to(shape.device))


MASKS: dict[str, Callable[[MaskShape, torch.Generator], MaskInput]] = {
    "padding_right": _padding("right"),
    "padding_left": _padding("left"),
    "padding_interior": _padding("interior"),
    "padding_scattered": _padding("scattered"),
    "padding_empty": _padding("empty"),
    "bool_QK": _bool("Q", "K", ndim=2),
    "bool_BQK": _bool("B", "Q", "K", ndim=3),
    "bool_per_head": _bool("B", "H", "Q", "K"),
    "bool_heads_only": _bool("H", "K"),
    "bool_empty_rows": _bool("B", "Q", "K", empty=True),
    "bias_QK": _bias("Q", "K", ndim=2),
    "bias_BQK": _bias("B", "Q", "K", ndim=3),
    "bias_keys": _bias("B", "K"),
    "bias_heads": _bias("H", "Q", "K"),
    "bias_full": _bias("B", "H", "Q", "K"),
    "bias_float32": _bias("B", "H", "Q", "K", dtype=torch.float32),
    "bias_infinite": _bias("B", "Q", "K", infinite=True),
    "all_true": _all_true,
    "all_zero": _all_zero,
    "block_documents": _block_documents,
    "block_per_head": _block_per_head,
    "block_table": _block_table,
}
"""Name -> how it is made. A part of the name says the dims it depends on."""
