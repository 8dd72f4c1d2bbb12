"""Quantised attention, forward only: INT8 Q Kᵀ, then P V in FP8 (E4M3) or in 16 bits.

Scheme and sources: see quantise.py; SageAttention 2 (https://arxiv.org/abs/2411.10958). The integer products of a 64-row tile
of queries with a block of keys share one scale per row (scale · log2 e · query scale · key-block scale), folded into the
multiply-add before exp2. The integer accumulator starts at 0x4B400000, so that its bits, read as a float, are already
12582912 + s and no conversion is needed; the constant goes into the same multiply-add and into the row maximum. P is scaled
by 2^8 before the cast to E4M3, so that its maximum lies near the top of that format's range. The FP8 product of every key
block goes to a fresh accumulator and is added in float32, because the tensor core's own FP8 sum carries only about 14 bits.

Numeric hazards: a NaN or inf in Q, K or V makes the scale of its row, block or channel NaN, and so the output; -inf - (-inf)
is avoided as in flash.py; the rounding of the folded constant stays below one integer step of s.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .arguments import (
    KeyRange,
    as_bytes,
    block_descriptor,
    blocks_of,
    broadcast_strides,
    check_inputs,
    is_hopper_or_newer,
    list_key_blocks,
    needs_wide_offsets,
    padding_strides,
    tma_ready,
)
from .hopper import runs_on_hopper
from .launch import facts, launch
from .quantise import ROUND_SHIFT, padded_dims, quantise
from .scores import LN_2, key_block_range, tanh, visible_by_position
from .scores import LOG2_E as LOG2_E_DEVICE
from .tiles import kind_of, sage_tile

# 0x4B400000, the bits of the float 12582912
_INTEGER_START = tl.constexpr(1262485504)


@triton.jit
def visit_quantised_blocks(
    accumulator, running_max, running_sum, q, row_scale, row_shift,
    key, key_scale, value, key_tiles, value_tiles, key_padding, mask, bias, block_list,
    first, last, batch, head_kv, key_row, value_row, key_blocks, offsets_m,
    stride_vn, stride_vd, stride_pn, stride_mm, stride_mn, stride_bm, stride_bn,
    softcap, window_left, window_right, seq_q, seq_k, head_dim_v,
    BLOCK_N: tl.constexpr, PAD_D: tl.constexpr, PAD_DV: tl.constexpr, FP8: tl.constexpr,
    MASKED: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr,
    WIDE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Fold key blocks first .. last - 1 (of block_list, where there is one) into the running softmax."""
    BLOCK_M: tl.constexpr = q.shape[0]
    P_SHIFT: tl.constexpr = 8.0 if FP8 else 0.0
    SCALE_BLOCK: tl.constexpr = 128
    columns = tl.arange(0, PAD_D)
    columns_v = tl.arange(0, PAD_DV)
    rows_n = tl.arange(0, BLOCK_N)
    if WIDE:
        rows_n = rows_n.to(tl.int64)
    block_scale = 0.0
    if block_list is None and first < last:
        block_scale = tl.load(key_scale + first * BLOCK_N // SCALE_BLOCK)
    for index in tl.range(first, last, num_stages=STAGES):
        block = index
        if block_list is not None:
            block = tl.load(block_list + index)
        start_n = block * BLOCK_N
        offsets_n = start_n + tl.arange(0, BLOCK_N)
        if key_tiles is not None:
            # (BLOCK_N, PAD_D)
            k = key_tiles.load([key_row + start_n, 0])
        else:
            k = tl.load(key + offsets_n[:, None].to(tl.int64) * PAD_D + columns[None, :])
        if block_list is not None:
            scale = row_scale * tl.load(key_scale + start_n // SCALE_BLOCK)
        else:
            scale = row_scale * block_scale
            block_scale = tl.load(key_scale + tl.minimum(index + 1, last - 1) * BLOCK_N // SCALE_BLOCK)
        # (BLOCK_M, BLOCK_N): the floats 12582912 + s
        start = tl.full([BLOCK_M, BLOCK_N], _INTEGER_START, tl.int32)
        bits = tl.dot(q, k.T, start, out_dtype=tl.int32)
        s = bits.to(tl.float32, bitcast=True)
        if MASKED:
            visible = visible_by_position(
                offsets_m[:, None], offsets_n[None, :], seq_k, window_left, window_right, HAS_LEFT, HAS_RIGHT
            )
            if key_padding is not None:
                in_padding = (
                    tl.load(key_padding + offsets_n.to(tl.int64) * stride_pn, mask=offsets_n < seq_k, other=0) != 0
                )
                visible = visible & in_padding[None, :]
            inside = (offsets_m[:, None] < seq_q) & (offsets_n[None, :] < seq_k)
            if mask is not None:
                tile = mask + offsets_m[:, None].to(tl.int64) * stride_mm + offsets_n[None, :].to(tl.int64) * stride_mn
                visible = visible & (tl.load(tile, mask=inside, other=0) != 0)
            s = (s - ROUND_SHIFT) * scale[:, None]
            if SOFTCAP:
                # The cap sees absolute scores: put back what smoothing the keys took away.
                s = softcap * LOG2_E_DEVICE * tanh((s + row_shift[:, None]) / (softcap * LOG2_E_DEVICE))
            if bias is not None:
                tile = bias + offsets_m[:, None].to(tl.int64) * stride_bm + offsets_n[None, :].to(tl.int64) * stride_bn
                s += tl.load(tile, mask=inside, other=0.0).to(tl.float32) * LOG2_E_DEVICE
            s = tl.where(visible, s, float("-inf"))
            new_max = tl.maximum(running_max, tl.max(s, axis=1))
            shift = tl.where(new_max == float("-inf"), 0.0, new_max)
            p = tl.math.exp2(s + (P_SHIFT - shift)[:, None])
        else:
            # These floats order like their bits, and integers have a maximum of three operands in one instruction.
            largest = tl.max(bits, axis=1).to(tl.float32, bitcast=True)
            new_max = tl.maximum(running_max, (largest - ROUND_SHIFT) * scale)
            shift = new_max
            p = tl.math.exp2(s * scale[:, None] + (P_SHIFT - shift - ROUND_SHIFT * scale)[:, None])
        decay = tl.math.exp2(running_max - shift)
        running_sum = running_sum * decay + tl.sum(p, axis=1)
        if FP8:
            # Into the order in which value tokens are stored: no data moves between threads.
            p = tl.permute(p.reshape([BLOCK_M, BLOCK_N // 16, 2, 4, 2]), (0, 1, 3, 2, 4)).reshape([BLOCK_M, BLOCK_N])
            if value_tiles is not None:
                # (PAD_DV, BLOCK_N)
                v = value_tiles.load([value_row, start_n])
            else:
                v = tl.load(value + columns_v[:, None].to(tl.int64) * (key_blocks * SCALE_BLOCK) + offsets_n[None, :])
            accumulator = accumulator * decay[:, None] + tl.dot(p.to(v.dtype), v.T)
        else:
            accumulator = accumulator * decay[:, None]
            if value_tiles is not None:
                # (BLOCK_N, PAD_DV)
                v = value_tiles.load([batch, head_kv, start_n, 0]).reshape(BLOCK_N, PAD_DV)
            else:
                rows = (
                    value
                    + start_n.to(tl.int64) * stride_vn
                    + rows_n[:, None] * stride_vn
                    + columns_v[None, :] * stride_vd
                )
                v = tl.load(rows, mask=(offsets_n[:, None] < seq_k) & (columns_v[None, :] < head_dim_v), other=0.0)
            if MASKED and key_padding is not None:
                # What lies in padding may be NaN, and 0 · NaN is NaN.
                v = tl.where(in_padding[:, None], v, 0.0)
            accumulator = tl.dot(p.to(v.dtype), v, accumulator)
        running_max = new_max
    return accumulator, running_max, running_sum


@triton.jit
def sage_forward_kernel(
    query, row_scales, row_shifts, key, key_scale, value, value_scale, value_mean, out, lse,
    query_tiles, key_tiles, value_tiles,
    key_padding, mask, bias, block_lists, block_counts,
    stride_vb, stride_vn, stride_vh, stride_vd, stride_ob, stride_om, stride_oh,
    stride_pb, stride_pn, stride_mb, stride_mh, stride_mm, stride_mn, stride_bb, stride_bh, stride_bm, stride_bn,
    stride_lb,
    softcap, window_left, window_right, heads, group, seq_q, seq_k, head_dim_v,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PAD_D: tl.constexpr, PAD_DV: tl.constexpr, FP8: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr,
    WIDE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program per (tile of queries, head, batch); all tiles of a head run together, so that its K and V stay in L2."""
    EVERY_TILE_MASKED: tl.constexpr = (mask is not None) or (bias is not None) or SOFTCAP
    num_tiles = tl.cdiv(seq_q, BLOCK_M)
    tile_m = tl.program_id(0) % num_tiles
    batch_head = tl.program_id(0) // num_tiles
    if HAS_RIGHT:
        # The last queries see the most keys: start them first.
        tile_m = num_tiles - 1 - tile_m
    batch = batch_head // heads
    head = batch_head % heads
    head_kv = head // group
    batch_head_kv = batch * (heads // group) + head_kv
    wide_batch = batch.to(tl.int64)
    wide_head = head.to(tl.int64)
    wide_row = batch_head_kv.to(tl.int64)
    key_blocks = tl.cdiv(seq_k, 128)
    start_m = tile_m * BLOCK_M
    offsets_m = start_m + tl.arange(0, BLOCK_M)
    wide_m = offsets_m.to(tl.int64)
    columns = tl.arange(0, PAD_D)
    columns_v = tl.arange(0, PAD_DV)

    query_row = batch_head * tl.cdiv(seq_q, 128) * 128 + start_m
    if query_tiles is not None:
        # (BLOCK_M, PAD_D)
        q = query_tiles.load([query_row, 0])
    else:
        rows = query + (query_row + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None] * PAD_D
        q = tl.load(rows + columns[None, :])
    row_scale = tl.load(row_scales + query_row + tl.arange(0, BLOCK_M))
    row_shift = tl.zeros([BLOCK_M], tl.float32)
    if row_shifts is not None:
        row_shift = tl.load(row_shifts + query_row + tl.arange(0, BLOCK_M))

    key += wide_row * key_blocks * 128 * PAD_D
    key_scale += wide_row * key_blocks
    if FP8:
        value += wide_row * key_blocks * 128 * PAD_DV
    else:
        value += wide_batch * stride_vb + head_kv.to(tl.int64) * stride_vh
    if key_padding is not None:
        key_padding += wide_batch * stride_pb
    if mask is not None:
        mask += wide_batch * stride_mb + wide_head * stride_mh
    if bias is not None:
        bias += wide_batch * stride_bb + wide_head * stride_bh

    accumulator = tl.zeros([BLOCK_M, PAD_DV], tl.float32)
    running_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    running_sum = tl.zeros([BLOCK_M], tl.float32)
    first, first_full, last_full, last = key_block_range(
        start_m, seq_k, window_left, window_right, BLOCK_M, BLOCK_N, HAS_LEFT, HAS_RIGHT
    )
    num_blocks = tl.cdiv(seq_k, BLOCK_N)
    LISTED: tl.constexpr = block_lists is not None
    if LISTED:
        block_lists += batch * stride_lb * 2 * num_blocks
        block_counts += batch * stride_lb * 2 * (num_blocks + 1)
    # Without a list of blocks: those that need a mask on the left, those that need none, those that need one on the right.
    # With one: the full blocks, then the partial ones. Where every tile needs a mask, one walk over all.
    for part in tl.static_range(3):
        blocks = None
        if LISTED:
            blocks = block_lists + (0 if part == 1 else num_blocks)
            counts = block_counts + (0 if part == 1 else num_blocks + 1)
            begin, end = tl.load(counts + first), tl.load(counts + last)
        elif EVERY_TILE_MASKED:
            begin, end = first, last
        elif part == 0:
            begin, end = first, first_full
        elif part == 1:
            begin, end = first_full, last_full
        else:
            begin, end = last_full, last
        if (
            part == 1
            or (part == 2 and (LISTED or not EVERY_TILE_MASKED))
            or (part == 0 and HAS_LEFT and not LISTED and not EVERY_TILE_MASKED)
        ):
            accumulator, running_max, running_sum = visit_quantised_blocks(
                accumulator, running_max, running_sum, q, row_scale, row_shift,
                key, key_scale, value, key_tiles, value_tiles, key_padding, mask, bias, blocks,
                begin, end, batch, head_kv, batch_head_kv * key_blocks * 128, batch_head_kv * PAD_DV, key_blocks, offsets_m,
                stride_vn, stride_vd, stride_pn, stride_mm, stride_mn, stride_bm, stride_bn,
                softcap, window_left, window_right, seq_q, seq_k, head_dim_v,
                BLOCK_N, PAD_D, PAD_DV, FP8,
                part != 1 or EVERY_TILE_MASKED or (LISTED and (HAS_LEFT or HAS_RIGHT)),
                HAS_LEFT, HAS_RIGHT, SOFTCAP, WIDE,
                # A walk over one or two blocks gains nothing from prefetching, and its buffers would cost occupancy.
                STAGES if part == 1 or LISTED else 1,
            )  # fmt: skip

    result = accumulator * tl.where(running_sum == 0.0, 0.0, 1.0 / running_sum)[:, None]
    if FP8:
        result = result * tl.load(value_scale + wide_row * PAD_DV + columns_v)[None, :]
    if value_mean is not None:
        mean = tl.load(value_mean + wide_row * PAD_DV + columns_v)
        result += tl.where(running_sum == 0.0, 0.0, 1.0)[:, None] * mean[None, :]
    if lse is not None:
        exponent = running_max + tl.math.log2(running_sum) - (8.0 if FP8 else 0.0)
        if not SOFTCAP:
            exponent += row_shift
        row_lse = tl.where(running_sum == 0.0, float("-inf"), exponent * LN_2)
        tl.store(lse + batch_head.to(tl.int64) * seq_q + offsets_m, row_lse, mask=offsets_m < seq_q)
    rows = out + wide_batch * stride_ob + wide_head * stride_oh + wide_m[:, None] * stride_om
    tl.store(
        rows + columns_v[None, :], result.to(out.dtype.element_ty),
        mask=(offsets_m[:, None] < seq_q) & (columns_v[None, :] < head_dim_v),
    )  # fmt: skip


def default_pv(device: torch.device) -> str:
    """ "fp8" where tensor cores have FP8 products (sm_89 and newer), "fp16" elsewhere."""
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 9):
        return "fp16"
    return "fp8"


def sage_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    is_causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    key_padding: Tensor | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    pv: str | None = None,
    smooth_v: bool = False,
    return_lse: bool = False,
    tile: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """INT8/FP8 attention of (B, Sq, H, D) queries over (B, Sk, Hkv, D) keys and (B, Sk, Hkv, Dv) values, no gradient.

    float16 or bfloat16; everything else about the inputs, the masks and the results is as in flash_attention_forward, without
    dropout. `pv` is the precision of the second product: "fp8" (sm_89 or newer), "fp16" (the values' own 16-bit type, which
    are then not copied), or None for the first of these that the device has. `smooth_v` subtracts each value channel's
    mean before the cast to FP8 and adds it back to the output: for values with a large common offset.

    Returns (out (B, Sq, H, Dv), lse (B, H, Sq) float32 in natural log, or None). Raises ValueError or TypeError for shapes,
    dtypes and precisions outside the above.
    """
    check_inputs(query, key, value)
    if query.dtype == torch.float32:
        raise TypeError("float32 is not supported by sage_attention (supported: float16, bfloat16)")
    if pv not in (None, "fp8", "fp16"):
        raise ValueError(f"pv={pv!r} is not one of None, 'fp8', 'fp16'")
    fp8 = (pv or default_pv(query.device)) == "fp8"
    if fp8 and default_pv(query.device) == "fp16":
        raise ValueError("pv='fp8' needs compute capability 8.9 or newer; use pv='fp16'")
    batch, seq_q, heads, _ = query.shape
    seq_k, heads_kv, head_dim_v = value.shape[1:]
    device = query.device
    out = torch.empty((batch, seq_q, heads, head_dim_v), dtype=query.dtype, device=device)
    lse = torch.empty((batch, heads, seq_q), dtype=torch.float32, device=device) if return_lse else None
    if out.numel() == 0 or seq_k == 0:
        return out.zero_(), lse.fill_(float("-inf")) if lse is not None else None
    keys = KeyRange.of(is_causal, window_size)
    pad_d, pad_dv = padded_dims(query, value)
    on_hopper = tile is None and fp8 and runs_on_hopper(query, keys, mask, bias, key_padding, softcap)
    if on_hopper:
        from . import hopper_sage

        on_hopper = hopper_sage.takes(query, key, pad_d, pad_dv)
    quantised = quantise(
        query, key, value, key_padding,
        scale=scale, fp8_value=fp8, smooth_v=smooth_v, wants_query=not on_hopper, wants_shift=return_lse or softcap > 0,
    )  # fmt: skip
    if on_hopper:
        hopper_sage.launch_sage_hopper(query, value, quantised, out, lse, scale, keys.right == 0)
        return out, lse
    assert quantised.query is not None
    if tile is None:
        rich = mask is not None or bias is not None or softcap > 0
        tile = sage_tile(query, max(pad_d, pad_dv), fp8, kind_of(key_padding is not None, rich))
    block_m, block_n = tile["BLOCK_M"], tile["BLOCK_N"]
    query_tiles = key_tiles = value_tiles = lists = counts = None
    if (
        tile["TMA"]
        and is_hopper_or_newer(device)
        and (fp8 or tma_ready(value))
        and max(quantised.query.numel(), quantised.key.numel()) < 2**31 * pad_d
    ):
        query_tiles = TensorDescriptor.from_tensor(quantised.query.view(-1, pad_d), [block_m, pad_d])
        key_tiles = TensorDescriptor.from_tensor(quantised.key.view(-1, pad_d), [block_n, pad_d])
        if quantised.value is not None:
            value_tiles = TensorDescriptor.from_tensor(
                quantised.value.view(-1, quantised.value.shape[-1]), [pad_dv, block_n]
            )
        else:
            value_tiles = block_descriptor(value, block_n, pad_dv)
    if key_padding is not None:
        lists, counts = list_key_blocks(key_padding, block_n)
    shape = (batch, heads, seq_q, seq_k)
    constants = {
        "BLOCK_M": block_m, "BLOCK_N": block_n, "PAD_D": pad_d, "PAD_DV": pad_dv, "FP8": fp8,
        "HAS_LEFT": keys.left >= 0, "HAS_RIGHT": keys.right >= 0, "SOFTCAP": softcap > 0,
        "WIDE": needs_wide_offsets(value), "STAGES": tile["STAGES"],
    }  # fmt: skip
    launch(
        sage_forward_kernel, (blocks_of(seq_q, block_m) * batch * heads,), device,
        (facts(query, key, value, key_padding, mask, bias), keys, return_lse, smooth_v, tile["TMA"],
         *constants.values(), *tile["options"].values()),
        (
            quantised.query, quantised.row_scale, quantised.row_shift, quantised.key, quantised.key_scale,
            value if quantised.value is None else quantised.value, quantised.value_scale, quantised.value_mean, out, lse,
            query_tiles, key_tiles, value_tiles,
            as_bytes(key_padding), as_bytes(mask), bias, lists, counts,
            *value.stride(), *out.stride()[:3],
            *padding_strides(key_padding, batch, seq_k), *broadcast_strides(mask, shape, "mask"),
            *broadcast_strides(bias, shape, "bias"), 0 if lists is None or lists.shape[0] == 1 else 1,
            float(softcap), keys.left, keys.right, heads, heads // heads_kv, seq_q, seq_k, head_dim_v,
        ),
        constants, tile["options"],
    )  # fmt: skip
    return out, lse
