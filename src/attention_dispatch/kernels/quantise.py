"""Quantisation for sage_attention: INT8 queries, smoothed INT8 keys, and values in E4M3, transposed, in three launches.

Scheme: SageAttention 2 (https://arxiv.org/abs/2411.10958), with coarser key blocks and finer queries. Softmax does not change
when one vector is subtracted from all keys, so any vector may serve as the "mean"; it is taken from up to 1,024 tokens
spread over the sequence, which spares a pass over K. Queries get one scale per token, keys one per block of 128, values one
per channel.

Values are stored (head_dim, seq) because 8-bit tensor-core products on Hopper want both operands contiguous along the
summed dimension, and each 16 tokens are stored in the order 0 1 8 9 2 3 10 11 4 5 12 13 6 7 14 15: then the registers that
hold a row of P after the first product are, unmoved, the operand of the second.

Numeric hazards: a scale is NaN when its block holds NaN or inf, so that these reach the output; a block of zeros gets a
small positive scale; keys hidden by a padding mask count as zero and may hold anything.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import as_bytes, padded_head_dim, padding_strides
from .launch import facts, launch

KEY_BLOCK = 128
_MEAN_PARTS = 16
_PART_ROWS = 64
_E4M3_MAX = 448.0
# Far below any score that matters, far above float32 underflow of 127 / amax.
_LEAST_AMAX = tl.constexpr(1e-30)
# 1.5 * 2^23: adding it to |x| < 2^22 rounds x to an integer, whose two's complement is then the low bits of the float.
ROUND_SHIFT = tl.constexpr(12582912.0)


class QuantisedKeyValue(NamedTuple):
    """`key` int8 (B·Hkv, S128, D), `key_scale` (B·Hkv, blocks), `key_mean` (B·Hkv, D); `value` float8 (B·Hkv, Dv, S128),
    `value_scale` (B·Hkv, Dv) and `value_mean` (B·Hkv, Dv), each None if not asked for. S128 is Sk rounded up to blocks of
    128, D and Dv are rounded up to powers of two."""

    key: Tensor
    key_scale: Tensor
    key_mean: Tensor
    value: Tensor | None
    value_scale: Tensor | None
    value_mean: Tensor | None


@triton.jit
def quantise_int8(x, amax):
    """x · 127 / amax rounded to nearest, as int8; amax broadcasts against x."""
    return (x * (127.0 / tl.maximum(amax, _LEAST_AMAX)) + ROUND_SHIFT).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def magnitude_bits(x):
    """|x| as int32 bits: they order like the floats, with inf and then NaN on top, where float maxima skip NaN."""
    return tl.abs(x).to(tl.int32, bitcast=True)


@triton.jit
def poisoned_scale(amax, LEVELS: tl.constexpr):
    """amax / LEVELS, or NaN where amax is NaN or inf."""
    return tl.maximum(amax, _LEAST_AMAX) / LEVELS + amax * 0.0


@triton.jit
def statistics_kernel(
    key, value, key_padding, mean_parts, part_counts, value_parts, value_amax,
    stride_kb, stride_kn, stride_kh, stride_kd, stride_vb, stride_vn, stride_vh, stride_vd, stride_pb, stride_pn,
    heads_kv, seq_k, head_dim, head_dim_v, sample_step, samples,
    PAD_D: tl.constexpr, PAD_DV: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr, PART_ROWS: tl.constexpr,
):  # fmt: skip
    """Sums and numbers of the sampled keys, in parts, and per-channel maxima of |V|."""
    block = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    batch_head = batch * heads_kv + head
    if key_padding is not None:
        key_padding += batch * stride_pb
    if block < PARTS:
        columns = tl.arange(0, PAD_D)
        sample = block * PART_ROWS + tl.arange(0, PART_ROWS)
        keys = sample.to(tl.int64) * sample_step
        inside = (sample < samples) & (keys < seq_k)
        if key_padding is not None:
            inside = inside & (tl.load(key_padding + keys * stride_pn, mask=inside, other=0) != 0)
        rows = key + batch * stride_kb + head * stride_kh + keys[:, None] * stride_kn
        # (PART_ROWS, PAD_D)
        k = tl.load(rows + columns[None, :] * stride_kd, mask=inside[:, None] & (columns[None, :] < head_dim), other=0.0)
        part = batch_head * PARTS + block
        tl.store(mean_parts + part * PAD_D + columns, tl.sum(k.to(tl.float32), axis=0))
        tl.store(part_counts + part, tl.sum(inside.to(tl.float32), axis=0))
        if value_parts is not None:
            columns_v = tl.arange(0, PAD_DV)
            rows = value + batch * stride_vb + head * stride_vh + keys[:, None] * stride_vn
            # (PART_ROWS, PAD_DV)
            v = tl.load(rows + columns_v[None, :] * stride_vd, mask=inside[:, None] & (columns_v[None, :] < head_dim_v), other=0.0)
            tl.store(value_parts + part * PAD_DV + columns_v, tl.sum(v.to(tl.float32), axis=0))
    if value_amax is not None:
        columns_v = tl.arange(0, PAD_DV)
        tokens = block * ROWS + tl.arange(0, ROWS)
        wide = tokens.to(tl.int64)
        inside = tokens < seq_k
        if key_padding is not None:
            inside = inside & (tl.load(key_padding + wide * stride_pn, mask=inside, other=0) != 0)
        rows = value + batch * stride_vb + head * stride_vh + wide[:, None] * stride_vn
        # (ROWS, PAD_DV)
        v = tl.load(rows + columns_v[None, :] * stride_vd, mask=inside[:, None] & (columns_v[None, :] < head_dim_v), other=0.0)
        bits = tl.max(magnitude_bits(v.to(tl.float32)), axis=0)
        tl.atomic_max(value_amax + batch_head * PAD_DV + columns_v, bits, sem="relaxed")


@triton.jit
def quantise_key_block(
    key, key_padding, mean_parts, part_counts, key_out, key_scale, key_mean, batch_head, block,
    stride_kn, stride_kd, stride_pn, seq_k, head_dim, num_blocks,
    PAD_D: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Subtract the mean from one block of keys and store it as INT8 with one scale."""
    columns = tl.arange(0, PAD_D)
    tokens = (block * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    inside = tokens < seq_k
    if key_padding is not None:
        inside = inside & (tl.load(key_padding + tokens * stride_pn, mask=inside, other=0) != 0)
    rows = key + tokens[:, None] * stride_kn + columns[None, :] * stride_kd
    # (BLOCK, PAD_D)
    k = tl.load(rows, mask=inside[:, None] & (columns[None, :] < head_dim), other=0.0)
    parts = batch_head * PARTS + tl.arange(0, PARTS)
    # (PARTS, PAD_D)
    total = tl.sum(tl.load(mean_parts + parts[:, None] * PAD_D + columns[None, :]), axis=0)
    mean = total / tl.maximum(tl.sum(tl.load(part_counts + parts), axis=0), 1.0)
    k = tl.where(inside[:, None], k.to(tl.float32) - mean[None, :], 0.0)
    amax = tl.max(magnitude_bits(k)).to(tl.float32, bitcast=True)
    tl.store(key_out + (batch_head * num_blocks * BLOCK + tokens[:, None]) * PAD_D + columns[None, :], quantise_int8(k, amax))
    tl.store(key_scale + batch_head * num_blocks + block, poisoned_scale(amax, 127.0))
    if block == 0:
        tl.store(key_mean + batch_head * PAD_D + columns, mean)


@triton.jit
def quantise_value_block(
    value, key_padding, part_counts, value_parts, value_amax, value_out, value_scale, value_mean, batch_head, block,
    stride_vn, stride_vd, stride_pn, seq_k, head_dim_v, num_blocks,
    PAD_DV: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, E4M3_MAX: tl.constexpr,
):  # fmt: skip
    """Store one block of values as E4M3, transposed and in the token order that the second product wants."""
    columns = tl.arange(0, PAD_DV)
    position = tl.arange(0, BLOCK)
    # position 16a + 4c + 2b + d holds token 16a + 8b + 2c + d
    token = position // 16 * 16 + position % 4 // 2 * 8 + position % 16 // 4 * 2 + position % 2
    tokens = (block * BLOCK + token).to(tl.int64)
    inside = tokens < seq_k
    if key_padding is not None:
        inside = inside & (tl.load(key_padding + tokens * stride_pn, mask=inside, other=0) != 0)
    rows = value + tokens[:, None] * stride_vn + columns[None, :] * stride_vd
    # (BLOCK, PAD_DV)
    v = tl.load(rows, mask=inside[:, None] & (columns[None, :] < head_dim_v), other=0.0).to(tl.float32)
    amax = tl.load(value_amax + batch_head * PAD_DV + columns).to(tl.float32, bitcast=True)
    if value_parts is not None:
        parts = batch_head * PARTS + tl.arange(0, PARTS)
        # (PARTS, PAD_DV)
        total = tl.sum(tl.load(value_parts + parts[:, None] * PAD_DV + columns[None, :]), axis=0)
        mean = total / tl.maximum(tl.sum(tl.load(part_counts + parts), axis=0), 1.0)
        v = tl.where(inside[:, None], v - mean[None, :], 0.0)
        # A bound on |v - mean| serves as well: E4M3 keeps its relative precision over four decades.
        amax += tl.abs(mean)
        if block == 0:
            tl.store(value_mean + batch_head * PAD_DV + columns, mean)
    v8 = (v * (E4M3_MAX / tl.maximum(amax, _LEAST_AMAX))[None, :]).to(value_out.dtype.element_ty)
    channels = value_out + (batch_head * PAD_DV + columns[:, None]) * (num_blocks * BLOCK)
    tl.store(channels + (block * BLOCK + position)[None, :], tl.trans(v8))
    if block == 0:
        tl.store(value_scale + batch_head * PAD_DV + columns, poisoned_scale(amax, E4M3_MAX))


@triton.jit
def quantise_kernel(
    key, value, key_padding, mean_parts, part_counts, value_parts, value_amax,
    key_out, key_scale, key_mean, value_out, value_scale, value_mean,
    stride_kb, stride_kn, stride_kh, stride_kd, stride_vb, stride_vn, stride_vh, stride_vd, stride_pb, stride_pn,
    heads_kv, seq_k, head_dim, head_dim_v, num_blocks,
    PAD_D: tl.constexpr, PAD_DV: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, E4M3_MAX: tl.constexpr,
):  # fmt: skip
    """One program per block of K and, where values are asked for, one per block of V: even and odd programs."""
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    batch_head = batch * heads_kv + head
    key += batch * stride_kb + head * stride_kh
    value += batch * stride_vb + head * stride_vh
    if key_padding is not None:
        key_padding += batch * stride_pb
    if value_out is None:
        quantise_key_block(
            key, key_padding, mean_parts, part_counts, key_out, key_scale, key_mean, batch_head, tl.program_id(0),
            stride_kn, stride_kd, stride_pn, seq_k, head_dim, num_blocks, PAD_D, BLOCK, PARTS,
        )  # fmt: skip
    else:
        # Backwards: what the statistics pass read last is still in L2.
        block = num_blocks - 1 - tl.program_id(0) // 2
        if tl.program_id(0) % 2 == 0:
            quantise_value_block(
                value, key_padding, part_counts, value_parts, value_amax, value_out, value_scale, value_mean,
                batch_head, block, stride_vn, stride_vd, stride_pn, seq_k, head_dim_v, num_blocks,
                PAD_DV, BLOCK, PARTS, E4M3_MAX,
            )  # fmt: skip
        else:
            quantise_key_block(
                key, key_padding, mean_parts, part_counts, key_out, key_scale, key_mean, batch_head, block,
                stride_kn, stride_kd, stride_pn, seq_k, head_dim, num_blocks, PAD_D, BLOCK, PARTS,
            )  # fmt: skip


@triton.jit
def quantise_query_kernel(
    query, key_mean, query_out, row_scale, row_shift,
    stride_qb, stride_qm, stride_qh, stride_qd, scale_log2, heads, group, seq_q, head_dim,
    PAD_D: tl.constexpr, BLOCK: tl.constexpr, NEGATE: tl.constexpr,
):  # fmt: skip
    """One program per block of queries: INT8 with one scale per token, into which scale · log2 e is folded."""
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    batch_head = batch * heads + head
    columns = tl.arange(0, PAD_D)
    tokens = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    rows = query + batch * stride_qb + head * stride_qh + tokens[:, None] * stride_qm + columns[None, :] * stride_qd
    # (BLOCK, PAD_D)
    q = tl.load(rows, mask=(tokens < seq_q)[:, None] & (columns[None, :] < head_dim), other=0.0).to(tl.float32)
    if NEGATE:
        q = -q
    amax = tl.max(magnitude_bits(q), axis=1).to(tl.float32, bitcast=True)
    flat = batch_head * tl.num_programs(0) * BLOCK + tokens
    tl.store(query_out + flat[:, None] * PAD_D + columns[None, :], quantise_int8(q, amax[:, None]))
    tl.store(row_scale + flat, poisoned_scale(amax, 127.0) * scale_log2)
    if row_shift is not None:
        mean = tl.load(key_mean + (batch * (heads // group) + head // group) * PAD_D + columns)
        tl.store(row_shift + flat, tl.sum(q * mean[None, :], axis=1) * scale_log2)


def quantise_query(
    query: Tensor, key_mean: Tensor, heads_kv: int, scale_log2: float, negate: bool, wants_shift: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """INT8 queries (B·H, S128, D) of a (B, Sq, H, head_dim) tensor, their scales (B·H, S128) in units of log2, and what
    smoothing the keys took away from each query's scores (B·H, S128), also in log2, if `wants_shift`."""
    batch, seq_q, heads, head_dim = query.shape
    pad_d = key_mean.shape[-1]
    blocks = triton.cdiv(seq_q, KEY_BLOCK)
    size = (batch * heads, blocks * KEY_BLOCK)
    query_out = torch.empty((*size, pad_d), dtype=torch.int8, device=query.device)
    row_scale = torch.empty(size, dtype=torch.float32, device=query.device)
    row_shift = torch.empty(size, dtype=torch.float32, device=query.device) if wants_shift else None
    launch(
        quantise_query_kernel, (blocks, heads, batch), query.device,
        (facts(query), heads_kv, negate, wants_shift),
        (query, key_mean, query_out, row_scale, row_shift, *query.stride(), scale_log2, heads, heads // heads_kv, seq_q, head_dim),
        {"PAD_D": pad_d, "BLOCK": KEY_BLOCK, "NEGATE": negate}, {"num_warps": 8},
    )  # fmt: skip
    return query_out, row_scale, row_shift


def quantise_key_value(key: Tensor, value: Tensor, key_padding: Tensor | None, fp8_value: bool, smooth_v: bool) -> QuantisedKeyValue:
    """Smoothed INT8 keys, and E4M3 values (smoothed too with `smooth_v`) unless `fp8_value` is false, of (B, Sk, Hkv, D) and (B, Sk, Hkv, Dv) tensors."""
    batch, seq_k, heads_kv, head_dim = key.shape
    head_dim_v = value.shape[3]
    device = key.device
    # 8-bit products sum over at least 32 at a time.
    pad_d, pad_dv = max(32, padded_head_dim(head_dim)), padded_head_dim(head_dim_v)
    rows = batch * heads_kv
    blocks = triton.cdiv(seq_k, KEY_BLOCK)
    mean_parts = torch.empty((rows, _MEAN_PARTS, pad_d), dtype=torch.float32, device=device)
    part_counts = torch.empty((rows, _MEAN_PARTS), dtype=torch.float32, device=device)
    key_out = torch.empty((rows, blocks * KEY_BLOCK, pad_d), dtype=torch.int8, device=device)
    key_scale = torch.empty((rows, blocks), dtype=torch.float32, device=device)
    key_mean = torch.empty((rows, pad_d), dtype=torch.float32, device=device)
    value_out = value_scale = value_amax = value_parts = value_mean = None
    if fp8_value:
        value_out = torch.empty((rows, pad_dv, blocks * KEY_BLOCK), dtype=torch.float8_e4m3fn, device=device)
        value_scale = torch.empty((rows, pad_dv), dtype=torch.float32, device=device)
        value_amax = torch.zeros((rows, pad_dv), dtype=torch.int32, device=device)
        if smooth_v:
            value_parts = torch.empty((rows, _MEAN_PARTS, pad_dv), dtype=torch.float32, device=device)
            value_mean = torch.empty((rows, pad_dv), dtype=torch.float32, device=device)
    samples = min(seq_k, _MEAN_PARTS * _PART_ROWS)
    strides = (*key.stride(), *value.stride(), *padding_strides(key_padding, batch, seq_k))
    padding = as_bytes(key_padding)
    facts_of_inputs = (facts(key, value, key_padding), fp8_value, smooth_v)
    launch(
        statistics_kernel, (max(blocks, _MEAN_PARTS) if fp8_value else _MEAN_PARTS, heads_kv, batch), device, facts_of_inputs,
        (
            key, value, padding, mean_parts, part_counts, value_parts, value_amax, *strides, heads_kv, seq_k, head_dim, head_dim_v,
            triton.cdiv(seq_k, samples), samples,
        ),
        {"PAD_D": pad_d, "PAD_DV": pad_dv, "ROWS": KEY_BLOCK, "PARTS": _MEAN_PARTS, "PART_ROWS": _PART_ROWS},
        {"num_warps": 4},
    )  # fmt: skip
    launch(
        quantise_kernel, (2 * blocks if fp8_value else blocks, heads_kv, batch), device, facts_of_inputs,
        (
            key, value, padding, mean_parts, part_counts, value_parts, value_amax,
            key_out, key_scale, key_mean, value_out, value_scale, value_mean,
            *strides, heads_kv, seq_k, head_dim, head_dim_v, blocks,
        ),
        {"PAD_D": pad_d, "PAD_DV": pad_dv, "BLOCK": KEY_BLOCK, "PARTS": _MEAN_PARTS, "E4M3_MAX": _E4M3_MAX},
        {"num_warps": 8},
    )  # fmt: skip
    return QuantisedKeyValue(key_out, key_scale, key_mean, value_out, value_scale, value_mean)
