"""Quantisation for sage_attention: INT8 queries, smoothed INT8 keys, and values in E4M3, transposed, in two launches.

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

from .arguments import LOG2_E, as_bytes, blocks_of, padded_head_dim, padding_strides
from .launch import facts, launch

KEY_BLOCK = 128
# Sums and maxima over the sequence are taken in this many parts, each by one program, and joined by whoever needs them.
_PARTS = 16
_SAMPLES = 1024
_E4M3_MAX = 448.0
# Far below any score that matters, far above float32 underflow of 127 / amax.
_LEAST_AMAX = tl.constexpr(1e-30)
# 1.5 * 2^23: adding it to |x| < 2^22 rounds x to an integer, whose two's complement is then the low bits of the float.
ROUND_SHIFT = tl.constexpr(12582912.0)


class Quantised(NamedTuple):
    """What the attention kernel reads, with every length rounded up to blocks of 128 (Sq128, Sk128) and D and Dv to powers of two.

    query: int8 (B·H, Sq128, D); row_scale: (B·H, Sq128), in units of log2; row_shift: (B·H, Sq128), what smoothing the keys
        took away from each query's scores, in log2. Each None if not asked for.
    key: int8 (B·Hkv, Sk128, D); key_scale: (B·Hkv, blocks); key_mean: (B·Hkv, D), what was subtracted.
    value: float8 (B·Hkv, Dv, Sk128), value_scale and value_mean: (B·Hkv, Dv), each None if not asked for.
    """

    query: Tensor | None
    row_scale: Tensor | None
    row_shift: Tensor | None
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


# Lengths change from call to call; a kernel compiled for one serves all.
@triton.jit(do_not_specialize=["heads_kv", "seq_k", "sample_step", "samples", "part_length"])
def statistics_kernel(
    key, value, key_padding, mean_parts, part_counts, value_parts, value_maxima,
    stride_kb, stride_kn, stride_kh, stride_kd, stride_vb, stride_vn, stride_vh, stride_vd, stride_pb, stride_pn,
    heads_kv, seq_k, head_dim, head_dim_v, sample_step, samples, part_length,
    PAD_D: tl.constexpr, PAD_DV: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr, PART_ROWS: tl.constexpr,
):  # fmt: skip
    """One program per part: sum and number of its sampled keys, and per-channel maxima of |V| over its share of the tokens."""
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    part = (batch * heads_kv + head) * PARTS + tl.program_id(0)
    if key_padding is not None:
        key_padding += batch * stride_pb
    key += batch * stride_kb + head * stride_kh
    value += batch * stride_vb + head * stride_vh
    columns = tl.arange(0, PAD_D)
    columns_v = tl.arange(0, PAD_DV)
    sample = tl.program_id(0) * PART_ROWS + tl.arange(0, PART_ROWS)
    keys = sample.to(tl.int64) * sample_step
    inside = (sample < samples) & (keys < seq_k)
    if key_padding is not None:
        inside = inside & (tl.load(key_padding + keys * stride_pn, mask=inside, other=0) != 0)
    rows = key + keys[:, None] * stride_kn + columns[None, :] * stride_kd
    # (PART_ROWS, PAD_D)
    k = tl.load(rows, mask=inside[:, None] & (columns[None, :] < head_dim), other=0.0)
    tl.store(mean_parts + part * PAD_D + columns, tl.sum(k.to(tl.float32), axis=0))
    tl.store(part_counts + part, tl.sum(inside.to(tl.float32), axis=0))
    if value_parts is not None:
        places_v = value + keys[:, None] * stride_vn + columns_v[None, :] * stride_vd
        # (PART_ROWS, PAD_DV)
        v = tl.load(places_v, mask=inside[:, None] & (columns_v[None, :] < head_dim_v), other=0.0)
        tl.store(value_parts + part * PAD_DV + columns_v, tl.sum(v.to(tl.float32), axis=0))
    if value_maxima is not None:
        first = tl.program_id(0) * part_length
        largest = tl.zeros([ROWS, PAD_DV], tl.int32)
        for start in range(first, tl.minimum(first + part_length, seq_k), ROWS):
            tokens = (start + tl.arange(0, ROWS)).to(tl.int64)
            visible = tokens < seq_k
            if key_padding is not None:
                visible = visible & (tl.load(key_padding + tokens * stride_pn, mask=visible, other=0) != 0)
            places = value + tokens[:, None] * stride_vn + columns_v[None, :] * stride_vd
            # (ROWS, PAD_DV)
            tile = tl.load(places, mask=visible[:, None] & (columns_v[None, :] < head_dim_v), other=0.0)
            largest = tl.maximum(largest, magnitude_bits(tile.to(tl.float32)))
        tl.store(value_maxima + part * PAD_DV + columns_v, tl.max(largest, axis=0))


@triton.jit
def sampled_mean(parts, part_counts, batch_head, columns, WIDTH: tl.constexpr, PARTS: tl.constexpr):
    """(WIDTH,) mean of the sampled tokens of one head."""
    part = batch_head * PARTS + tl.arange(0, PARTS)
    # (PARTS, WIDTH)
    total = tl.sum(tl.load(parts + part[:, None] * WIDTH + columns[None, :]), axis=0)
    return total / tl.maximum(tl.sum(tl.load(part_counts + part), axis=0), 1.0)


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
    mean = sampled_mean(mean_parts, part_counts, batch_head, columns, PAD_D, PARTS)
    k = tl.where(inside[:, None], k.to(tl.float32) - mean[None, :], 0.0)
    amax = tl.max(magnitude_bits(k)).to(tl.float32, bitcast=True)
    tl.store(
        key_out + (batch_head * num_blocks * BLOCK + tokens[:, None]) * PAD_D + columns[None, :], quantise_int8(k, amax)
    )
    tl.store(key_scale + batch_head * num_blocks + block, poisoned_scale(amax, 127.0))
    if block == 0:
        tl.store(key_mean + batch_head * PAD_D + columns, mean)


@triton.jit
def quantise_value_block(
    value, key_padding, part_counts, value_parts, value_maxima, value_out, value_scale, value_mean, batch_head, block,
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
    part = batch_head * PARTS + tl.arange(0, PARTS)
    # (PARTS, PAD_DV)
    maxima = tl.load(value_maxima + part[:, None] * PAD_DV + columns[None, :])
    amax = tl.max(maxima, axis=0).to(tl.float32, bitcast=True)
    if value_parts is not None:
        mean = sampled_mean(value_parts, part_counts, batch_head, columns, PAD_DV, PARTS)
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
def quantise_query_block(
    query, mean_parts, part_counts, query_out, row_scale, row_shift, batch_head, batch_head_kv, block,
    stride_qm, stride_qd, scale_log2, seq_q, head_dim, query_blocks,
    PAD_D: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, NEGATE: tl.constexpr,
):  # fmt: skip
    """Store one block of queries as INT8 with one scale per token, into which scale · log2 e is folded."""
    columns = tl.arange(0, PAD_D)
    tokens = (block * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    rows = query + tokens[:, None] * stride_qm + columns[None, :] * stride_qd
    # (BLOCK, PAD_D)
    q = tl.load(rows, mask=(tokens < seq_q)[:, None] & (columns[None, :] < head_dim), other=0.0).to(tl.float32)
    if NEGATE:
        q = -q
    amax = tl.max(magnitude_bits(q), axis=1).to(tl.float32, bitcast=True)
    flat = batch_head * query_blocks * BLOCK + tokens
    tl.store(query_out + flat[:, None] * PAD_D + columns[None, :], quantise_int8(q, amax[:, None]))
    tl.store(row_scale + flat, poisoned_scale(amax, 127.0) * scale_log2)
    if row_shift is not None:
        mean = sampled_mean(mean_parts, part_counts, batch_head_kv, columns, PAD_D, PARTS)
        tl.store(row_shift + flat, tl.sum(q * mean[None, :], axis=1) * scale_log2)


@triton.jit(do_not_specialize=["heads_kv", "group", "seq_q", "seq_k", "query_blocks", "num_blocks"])
def quantise_kernel(
    query, key, value, key_padding, mean_parts, part_counts, value_parts, value_maxima,
    query_out, row_scale, row_shift, key_out, key_scale, key_mean, value_out, value_scale, value_mean,
    stride_qb, stride_qm, stride_qh, stride_qd,
    stride_kb, stride_kn, stride_kh, stride_kd, stride_vb, stride_vn, stride_vh, stride_vd, stride_pb, stride_pn,
    scale_log2, heads_kv, group, seq_q, seq_k, head_dim, head_dim_v, query_blocks, num_blocks,
    PAD_D: tl.constexpr, PAD_DV: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, E4M3_MAX: tl.constexpr,
    NEGATE: tl.constexpr,
):  # fmt: skip
    """One program per block of K, of V where values are asked for, and of the queries of each head that reads them."""
    program = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    batch_head = batch * heads_kv + head
    if key_padding is not None:
        key_padding += batch * stride_pb
    KINDS: tl.constexpr = 1 if value_out is None else 2
    # Backwards: what the statistics pass read last is still in L2.
    block = num_blocks - 1 - program // KINDS
    if query_out is not None and block < 0:
        index = program - KINDS * num_blocks
        head_q = head * group + index // query_blocks
        quantise_query_block(
            query + batch * stride_qb + head_q * stride_qh, mean_parts, part_counts, query_out, row_scale, row_shift,
            batch * heads_kv * group + head_q, batch_head, index % query_blocks,
            stride_qm, stride_qd, scale_log2, seq_q, head_dim, query_blocks, PAD_D, BLOCK, PARTS, NEGATE,
        )  # fmt: skip
    elif value_out is not None and program % KINDS == 1:
        quantise_value_block(
            value + batch * stride_vb + head * stride_vh, key_padding, part_counts, value_parts, value_maxima,
            value_out, value_scale, value_mean, batch_head, block,
            stride_vn, stride_vd, stride_pn, seq_k, head_dim_v, num_blocks, PAD_DV, BLOCK, PARTS, E4M3_MAX,
        )  # fmt: skip
    else:
        quantise_key_block(
            key + batch * stride_kb + head * stride_kh, key_padding, mean_parts, part_counts, key_out, key_scale, key_mean,
            batch_head, block, stride_kn, stride_kd, stride_pn, seq_k, head_dim, num_blocks, PAD_D, BLOCK, PARTS,
        )  # fmt: skip


def padded_dims(query: Tensor, value: Tensor) -> tuple[int, int]:
    """Head_dims of the copies of Q and K, and of V. 8-bit products sum over at least 32 at a time."""
    return max(32, padded_head_dim(query.shape[3])), padded_head_dim(value.shape[3])


def quantise(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding: Tensor | None,
    *,
    scale: float,
    fp8_value: bool,
    smooth_v: bool,
    wants_query: bool,
    wants_shift: bool,
) -> Quantised:
    """Smoothed INT8 keys, and if asked for INT8 queries and E4M3 values (smoothed too with `smooth_v`).

    query (B, Sq, H, D), key (B, Sk, Hkv, D), value (B, Sk, Hkv, Dv). `scale`, of either sign, multiplies the scores.
    """
    batch, seq_q, heads, head_dim = query.shape
    seq_k, heads_kv, head_dim_v = value.shape[1:]
    device = query.device
    pad_d, pad_dv = padded_dims(query, value)
    rows = batch * heads_kv
    query_blocks, blocks = blocks_of(seq_q, KEY_BLOCK), blocks_of(seq_k, KEY_BLOCK)

    def made(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    query_out = row_scale = row_shift = None
    if wants_query:
        query_rows = batch * heads, query_blocks * KEY_BLOCK
        query_out, row_scale = made(*query_rows, pad_d, dtype=torch.int8), made(*query_rows)
        row_shift = made(*query_rows) if wants_shift else None
    key_out, key_scale = made(rows, blocks * KEY_BLOCK, pad_d, dtype=torch.int8), made(rows, blocks)
    key_mean = made(rows, pad_d)
    mean_parts, part_counts = made(rows, _PARTS, pad_d), made(rows, _PARTS)
    value_out = value_scale = value_maxima = value_parts = value_mean = None
    if fp8_value:
        value_out, value_scale = made(rows, pad_dv, blocks * KEY_BLOCK, dtype=torch.float8_e4m3fn), made(rows, pad_dv)
        value_maxima = made(rows, _PARTS, pad_dv, dtype=torch.int32)
        if smooth_v:
            value_parts, value_mean = made(rows, _PARTS, pad_dv), made(rows, pad_dv)
    samples = min(seq_k, _SAMPLES)
    strides = (*key.stride(), *value.stride(), *padding_strides(key_padding, batch, seq_k))
    padding = as_bytes(key_padding)
    launch(
        statistics_kernel, (_PARTS, heads_kv, batch), device, (facts(key, value, key_padding), fp8_value, smooth_v),
        (
            key, value, padding, mean_parts, part_counts, value_parts, value_maxima, *strides,
            heads_kv, seq_k, head_dim, head_dim_v, blocks_of(seq_k, samples), samples,
            blocks_of(blocks, _PARTS) * KEY_BLOCK,
        ),
        {"PAD_D": pad_d, "PAD_DV": pad_dv, "ROWS": 64, "PARTS": _PARTS, "PART_ROWS": _SAMPLES // _PARTS},
        {"num_warps": 8},
    )  # fmt: skip
    programs = (2 if fp8_value else 1) * blocks + (heads // heads_kv * query_blocks if wants_query else 0)
    launch(
        quantise_kernel, (programs, heads_kv, batch), device,
        (facts(query, key, value, key_padding), fp8_value, smooth_v, wants_query, wants_shift, scale < 0),
        (
            query, key, value, padding, mean_parts, part_counts, value_parts, value_maxima,
            query_out, row_scale, row_shift, key_out, key_scale, key_mean, value_out, value_scale, value_mean,
            *query.stride(), *strides,
            abs(scale) * LOG2_E, heads_kv, heads // heads_kv, seq_q, seq_k, head_dim, head_dim_v, query_blocks, blocks,
        ),
        {"PAD_D": pad_d, "PAD_DV": pad_dv, "BLOCK": KEY_BLOCK, "PARTS": _PARTS, "E4M3_MAX": _E4M3_MAX, "NEGATE": scale < 0},
        {"num_warps": 8},
    )  # fmt: skip
    return Quantised(query_out, row_scale, row_shift, key_out, key_scale, key_mean, value_out, value_scale, value_mean)
