"""Exact attention, forward: softmax(scale · Q Kᵀ + bias) V in one pass over the keys, with the online softmax.

Algorithm: Dao et al., FlashAttention-2 (https://arxiv.org/abs/2307.08691). For each tile of queries the kernel walks over the
visible key blocks and keeps a running row maximum m, a running sum l of 2^(s - m) and an unnormalised accumulator; at the end
out = accumulator / l and lse = (m + log2 l) · ln 2. Scores are kept in units of log2, so that the scale, the shift by m and
the exponential are one fused multiply-add and one exp2.

Numeric hazards: a row that has seen no key yet has m = -inf, and -inf - (-inf) must not happen, so masked tiles shift by 0
there; a row that never sees a key has l = 0 and gets output 0 and lse -inf; a NaN reaches l through p and so the output.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import (
    LOG2_E,
    KeyRange,
    as_bytes,
    block_descriptor,
    blocks_of,
    broadcast_strides,
    check_inputs,
    is_hopper_or_newer,
    list_key_blocks,
    needs_wide_offsets,
    padded_head_dim,
    padding_strides,
    tma_ready,
)
from .hopper import runs_on_hopper
from .launch import facts, launch
from .scores import LN_2, keep_probability, key_block_range, tanh, visible_by_position
from .scores import LOG2_E as LOG2_E_DEVICE
from .tiles import forward_tile, kind_of


@triton.jit
def visit_key_blocks(
    accumulator, running_max, running_sum, q,
    key, value, key_tiles, value_tiles, key_padding, mask, bias, block_list, seed,
    first, last, batch, head, head_kv, heads, offsets_m, batch_head,
    stride_kn, stride_kd, stride_vn, stride_vd, stride_pn, stride_mm, stride_mn, stride_bm, stride_bn,
    scale_log2, softcap, window_left, window_right, dropout_p, seq_q, seq_k, head_dim, head_dim_v,
    BLOCK_N: tl.constexpr, PAD_D: tl.constexpr, PAD_DV: tl.constexpr,
    MASKED: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Fold key blocks first .. last - 1 (of block_list, where there is one) into the running softmax."""
    HAS_DROPOUT: tl.constexpr = seed is not None
    columns = tl.arange(0, PAD_D)
    columns_v = tl.arange(0, PAD_DV)
    rows_n = tl.arange(0, BLOCK_N)
    if WIDE:
        rows_n = rows_n.to(tl.int64)
    for index in tl.range(first, last, num_stages=STAGES):
        block = index
        if block_list is not None:
            block = tl.load(block_list + index)
        start_n = block * BLOCK_N
        offsets_n = start_n + tl.arange(0, BLOCK_N)
        if key_tiles is not None:
            # (BLOCK_N, PAD_D)
            k = key_tiles.load([batch, head_kv, start_n, 0]).reshape(BLOCK_N, PAD_D)
        else:
            rows = key + start_n.to(tl.int64) * stride_kn + rows_n[:, None] * stride_kn + columns[None, :] * stride_kd
            k = tl.load(rows, mask=(offsets_n[:, None] < seq_k) & (columns[None, :] < head_dim), other=0.0)
        # (BLOCK_M, BLOCK_N)
        s = tl.dot(q, k.T, input_precision=PRECISION)
        if MASKED:
            visible = visible_by_position(
                offsets_m[:, None], offsets_n[None, :], seq_k, window_left, window_right, HAS_LEFT, HAS_RIGHT
            )
            if key_padding is not None:
                keys = key_padding + offsets_n.to(tl.int64) * stride_pn
                in_padding = tl.load(keys, mask=offsets_n < seq_k, other=0) != 0
                visible = visible & in_padding[None, :]
            inside = (offsets_m[:, None] < seq_q) & (offsets_n[None, :] < seq_k)
            if mask is not None:
                tile = mask + offsets_m[:, None].to(tl.int64) * stride_mm + offsets_n[None, :].to(tl.int64) * stride_mn
                visible = visible & (tl.load(tile, mask=inside, other=0) != 0)
            s = s * scale_log2
            if SOFTCAP:
                s = softcap * LOG2_E_DEVICE * tanh(s / (softcap * LOG2_E_DEVICE))
            if bias is not None:
                tile = bias + offsets_m[:, None].to(tl.int64) * stride_bm + offsets_n[None, :].to(tl.int64) * stride_bn
                s += tl.load(tile, mask=inside, other=0.0).to(tl.float32) * LOG2_E_DEVICE
            s = tl.where(visible, s, float("-inf"))
            new_max = tl.maximum(running_max, tl.max(s, axis=1))
            shift = tl.where(new_max == float("-inf"), 0.0, new_max)
            p = tl.math.exp2(s - shift[:, None])
        else:
            new_max = tl.maximum(running_max, tl.max(s, axis=1) * scale_log2)
            shift = new_max
            p = tl.math.exp2(s * scale_log2 - shift[:, None])
        decay = tl.math.exp2(running_max - shift)
        running_sum = running_sum * decay + tl.sum(p, axis=1)
        if HAS_DROPOUT:
            keep = keep_probability(tl.load(seed), offsets_m[:, None], offsets_n[None, :], batch_head, dropout_p)
            p = tl.where(keep, p / (1.0 - dropout_p), 0.0)
        accumulator = accumulator * decay[:, None]
        if value_tiles is not None:
            # (BLOCK_N, PAD_DV)
            v = value_tiles.load([batch, head_kv, start_n, 0]).reshape(BLOCK_N, PAD_DV)
        else:
            rows = (
                value + start_n.to(tl.int64) * stride_vn + rows_n[:, None] * stride_vn + columns_v[None, :] * stride_vd
            )
            v = tl.load(rows, mask=(offsets_n[:, None] < seq_k) & (columns_v[None, :] < head_dim_v), other=0.0)
        if MASKED and key_padding is not None:
            # What lies in padding may be NaN, and 0 · NaN is NaN.
            v = tl.where(in_padding[:, None], v, 0.0)
        accumulator = tl.dot(p.to(v.dtype), v, accumulator, input_precision=PRECISION)
        running_max = new_max
    return accumulator, running_max, running_sum


@triton.jit
def flash_forward_kernel(
    query, key, value, out, lse, key_tiles, value_tiles, key_padding, mask, bias, block_lists, block_counts, seed,
    stride_qb, stride_qm, stride_qh, stride_qd, stride_kb, stride_kn, stride_kh, stride_kd,
    stride_vb, stride_vn, stride_vh, stride_vd, stride_ob, stride_om, stride_oh,
    stride_pb, stride_pn, stride_mb, stride_mh, stride_mm, stride_mn, stride_bb, stride_bh, stride_bm, stride_bn,
    stride_lb,
    scale_log2, softcap, window_left, window_right, dropout_p,
    heads, group, seq_q, seq_k, head_dim, head_dim_v,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PAD_D: tl.constexpr, PAD_DV: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, NEGATE: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
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
    wide_batch = batch.to(tl.int64)
    wide_head = head.to(tl.int64)
    wide_head_kv = head_kv.to(tl.int64)
    start_m = tile_m * BLOCK_M
    offsets_m = start_m + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, PAD_D)
    columns_v = tl.arange(0, PAD_DV)
    wide_m = offsets_m.to(tl.int64)

    # (BLOCK_M, PAD_D)
    rows = query + wide_batch * stride_qb + wide_head * stride_qh + wide_m[:, None] * stride_qm
    q = tl.load(
        rows + columns[None, :] * stride_qd,
        mask=(offsets_m[:, None] < seq_q) & (columns[None, :] < head_dim),
        other=0.0,
    )
    if NEGATE:
        q = -q
    key += wide_batch * stride_kb + wide_head_kv * stride_kh
    value += wide_batch * stride_vb + wide_head_kv * stride_vh
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
    if block_lists is not None:
        num_blocks = tl.cdiv(seq_k, BLOCK_N)
        block_lists += batch * stride_lb * 2 * num_blocks
        block_counts += batch * stride_lb * 2 * (num_blocks + 1)
        for kind in tl.static_range(2):
            counts = block_counts + kind * (num_blocks + 1)
            accumulator, running_max, running_sum = visit_key_blocks(
                accumulator, running_max, running_sum, q,
                key, value, key_tiles, value_tiles, key_padding, mask, bias, block_lists + kind * num_blocks, seed,
                tl.load(counts + first), tl.load(counts + last), batch, head, head_kv, heads, offsets_m, batch_head,
                stride_kn, stride_kd, stride_vn, stride_vd, stride_pn, stride_mm, stride_mn, stride_bm, stride_bn,
                scale_log2, softcap, window_left, window_right, dropout_p, seq_q, seq_k, head_dim, head_dim_v,
                BLOCK_N, PAD_D, PAD_DV, kind == 1 or EVERY_TILE_MASKED or HAS_LEFT or HAS_RIGHT, HAS_LEFT, HAS_RIGHT,
                SOFTCAP, WIDE, PRECISION, STAGES,
            )  # fmt: skip
    elif EVERY_TILE_MASKED:
        accumulator, running_max, running_sum = visit_key_blocks(
            accumulator, running_max, running_sum, q,
            key, value, key_tiles, value_tiles, key_padding, mask, bias, None, seed,
            first, last, batch, head, head_kv, heads, offsets_m, batch_head,
            stride_kn, stride_kd, stride_vn, stride_vd, stride_pn, stride_mm, stride_mn, stride_bm, stride_bn,
            scale_log2, softcap, window_left, window_right, dropout_p, seq_q, seq_k, head_dim, head_dim_v,
            BLOCK_N, PAD_D, PAD_DV, True, HAS_LEFT, HAS_RIGHT, SOFTCAP, WIDE, PRECISION, STAGES,
        )  # fmt: skip
    else:
        for part in tl.static_range(3):
            if part == 0:
                begin, end = first, first_full
            elif part == 1:
                begin, end = first_full, last_full
            else:
                begin, end = last_full, last
            if part != 0 or HAS_LEFT:
                accumulator, running_max, running_sum = visit_key_blocks(
                    accumulator, running_max, running_sum, q,
                    key, value, key_tiles, value_tiles, key_padding, mask, bias, None, seed,
                    begin, end, batch, head, head_kv, heads, offsets_m, batch_head,
                    stride_kn, stride_kd, stride_vn, stride_vd, stride_pn, stride_mm, stride_mn, stride_bm, stride_bn,
                    scale_log2, softcap, window_left, window_right, dropout_p, seq_q, seq_k, head_dim, head_dim_v,
                    BLOCK_N, PAD_D, PAD_DV, part != 1, HAS_LEFT, HAS_RIGHT, SOFTCAP, WIDE, PRECISION, STAGES,
                )  # fmt: skip

    inverse = tl.where(running_sum == 0.0, 0.0, 1.0 / running_sum)
    result = accumulator * inverse[:, None]
    if lse is not None:
        row_lse = tl.where(running_sum == 0.0, float("-inf"), (running_max + tl.math.log2(running_sum)) * LN_2)
        tl.store(lse + batch_head.to(tl.int64) * seq_q + offsets_m, row_lse, mask=offsets_m < seq_q)
    rows = out + wide_batch * stride_ob + wide_head * stride_oh + wide_m[:, None] * stride_om
    tl.store(
        rows + columns_v[None, :], result.to(out.dtype.element_ty),
        mask=(offsets_m[:, None] < seq_q) & (columns_v[None, :] < head_dim_v),
    )  # fmt: skip


def dropout_seed_tensor(dropout_p: float, dropout_seed: Tensor | int | None, device: torch.device) -> Tensor | None:
    """The philox seed as a one-element int64 tensor on the device: drawn from torch's generator there if not given."""
    if not dropout_p:
        return None
    if dropout_seed is None:
        return torch.randint(2**62, (1,), dtype=torch.int64, device=device)
    if isinstance(dropout_seed, int):
        return torch.full((1,), dropout_seed, dtype=torch.int64, device=device)
    return dropout_seed


def flash_attention_forward(
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
    dropout_p: float = 0.0,
    dropout_seed: Tensor | int | None = None,
    return_lse: bool = False,
    tile: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Exact attention of (B, Sq, H, D) queries over (B, Sk, Hkv, D) keys and (B, Sk, Hkv, Dv) values, no gradient.

    float16, bfloat16 or float32; head_dim up to 256; H a multiple of Hkv; any strides. `is_causal` and `window_size` =
    (left, right) are aligned top-left: query i sees keys i - left .. i + right, -1 meaning unbounded. `key_padding` is
    (B or 1, Sk) bool, `mask` a 4-D bool (True = attend) and `bias` a 4-D float tensor, both broadcastable to
    (B, H, Sq, Sk) and read without being expanded. `softcap` > 0 caps scaled scores at softcap · tanh(score / softcap).
    `dropout_seed` makes dropout repeatable; it is drawn from torch's generator when absent.

    Returns (out (B, Sq, H, Dv), lse (B, H, Sq) float32 in natural log, or None). A query that sees no key gets output 0
    and lse -inf. Raises ValueError or TypeError for shapes and dtypes outside the above.
    """
    check_inputs(query, key, value)
    batch, seq_q, heads, head_dim = query.shape
    seq_k, heads_kv, head_dim_v = value.shape[1:]
    out = torch.empty((batch, seq_q, heads, head_dim_v), dtype=query.dtype, device=query.device)
    lse = torch.empty((batch, heads, seq_q), dtype=torch.float32, device=query.device) if return_lse else None
    if out.numel() == 0 or seq_k == 0:
        return out.zero_(), lse.fill_(float("-inf")) if lse is not None else None
    keys = KeyRange.of(is_causal, window_size)
    refused = mask, bias, key_padding, softcap, dropout_p
    if tile is None and scale > 0 and runs_on_hopper(query, keys, *refused) and tma_ready(query, key, value):
        from . import hopper_flash

        if hopper_flash.takes(query, value):
            hopper_flash.launch_flash_hopper(query, key, value, out, lse, scale, keys.right == 0)
            return out, lse
    pad_d, pad_dv = padded_head_dim(head_dim), padded_head_dim(head_dim_v)
    if tile is None:
        rich = mask is not None or bias is not None or softcap > 0 or dropout_p > 0
        tile = forward_tile(query, max(pad_d, pad_dv), kind_of(key_padding is not None, rich))
    block_m, block_n = tile["BLOCK_M"], tile["BLOCK_N"]
    key_tiles = value_tiles = lists = counts = None
    if tile["TMA"] and is_hopper_or_newer(query.device) and tma_ready(key, value):
        key_tiles, value_tiles = block_descriptor(key, block_n, pad_d), block_descriptor(value, block_n, pad_dv)
    if key_padding is not None:
        lists, counts = list_key_blocks(key_padding, block_n)
    shape = (batch, heads, seq_q, seq_k)
    grid = (blocks_of(seq_q, block_m) * batch * heads,)
    constants = {
        "BLOCK_M": block_m, "BLOCK_N": block_n, "PAD_D": pad_d, "PAD_DV": pad_dv,
        "HAS_LEFT": keys.left >= 0, "HAS_RIGHT": keys.right >= 0, "SOFTCAP": softcap > 0, "NEGATE": scale < 0,
        "WIDE": needs_wide_offsets(key, value), "PRECISION": "ieee", "STAGES": tile["STAGES"],
    }  # fmt: skip
    seed = dropout_seed_tensor(dropout_p, dropout_seed, query.device)
    launch(
        flash_forward_kernel, grid, query.device,
        (facts(query, key, value, key_padding, mask, bias, seed), keys, return_lse, tile["TMA"],
         *constants.values(), *tile["options"].values()),
        (
            query, key, value, out, lse, key_tiles, value_tiles, as_bytes(key_padding), as_bytes(mask), bias, lists, counts,
            seed,
            *query.stride(), *key.stride(), *value.stride(), *out.stride()[:3],
            *padding_strides(key_padding, batch, seq_k), *broadcast_strides(mask, shape, "mask"),
            *broadcast_strides(bias, shape, "bias"), 0 if lists is None or lists.shape[0] == 1 else 1,
            abs(scale) * LOG2_E, float(softcap), keys.left, keys.right, float(dropout_p),
            heads, heads // heads_kv, seq_q, seq_k, head_dim, head_dim_v,
        ),
        constants, tile["options"],
    )  # fmt: skip
    return out, lse
