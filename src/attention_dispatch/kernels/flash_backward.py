"""Exact attention, backward: gradients of query, key, value and bias, recomputing the probabilities from the saved lse.

With P = 2^(S - lse), dP = dO Vᵀ and delta = rowsum(dO · O) - dlse (Dao et al., https://arxiv.org/abs/2307.08691):
dS = P · (dP - delta), dQ = scale · dS K, dK = scale · dSᵀ Q, dV = Pᵀ dO. One kernel owns tiles of keys and sums dK and dV
over the queries and over the query heads that share the key head; another owns tiles of queries and sums dQ; a third, run
only for a bias that wants a gradient, owns tiles of the bias and sums dS over the dimensions that were broadcast. Nothing
is accumulated with atomics, so results are bitwise repeatable, and nothing of size Sq × Sk exists beyond the bias itself.

Numeric hazards: an empty row has lse -inf; it is read as +inf, so that its probabilities are exactly 0.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import (
    LOG2_E,
    KeyRange,
    as_bytes,
    blocks_of,
    broadcast_strides,
    needs_wide_offsets,
    padded_head_dim,
    padding_strides,
)
from .flash import dropout_seed_tensor
from .launch import facts, launch
from .scores import LOG2_E as LOG2_E_DEVICE
from .scores import keep_probability, key_block_range, query_block_range, tanh, visible_by_position
from .tiles import backward_tiles


@triton.jit
def load_rows(
    base, offsets, stride_s, stride_d, seq, head_dim, PAD_D: tl.constexpr, EVEN_D: tl.constexpr, WIDE: tl.constexpr
):
    """(len(offsets), PAD_D) tile of a (seq, head_dim) matrix, zero outside it."""
    columns = tl.arange(0, PAD_D)
    rows = offsets.to(tl.int64) if WIDE else offsets
    inside = offsets[:, None] < seq
    if not EVEN_D:
        inside = inside & (columns[None, :] < head_dim)
    return tl.load(base + rows[:, None] * stride_s + columns[None, :] * stride_d, mask=inside, other=0.0)


@triton.jit
def probabilities_and_gradient(
    s, dp, row_lse, row_delta, offsets_m, offsets_n, key_padding, mask, bias, seed, batch_head,
    stride_pn, stride_mm, stride_mn, stride_bm, stride_bn,
    scale_log2, softcap, window_left, window_right, dropout_p, seq_q, seq_k,
    MASKED: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """From raw products: P as it multiplied V (dropout applied), dS before the scale and the cap, and dS of the raw scores.

    `offsets_m` and `offsets_n` arrive with the axis of the other one added, so a tile may lie either way round.
    """
    s = s * scale_log2
    slope = 1.0
    if SOFTCAP:
        capped = tanh(s / (softcap * LOG2_E_DEVICE))
        s = softcap * LOG2_E_DEVICE * capped
        slope = 1.0 - capped * capped
    inside = (offsets_m < seq_q) & (offsets_n < seq_k)
    if bias is not None:
        tile = bias + offsets_m.to(tl.int64) * stride_bm + offsets_n.to(tl.int64) * stride_bn
        s += tl.load(tile, mask=inside, other=0.0).to(tl.float32) * LOG2_E_DEVICE
    p = tl.math.exp2(s - row_lse)
    if MASKED:
        visible = inside & visible_by_position(
            offsets_m, offsets_n, seq_k, window_left, window_right, HAS_LEFT, HAS_RIGHT
        )
        if key_padding is not None:
            visible = visible & (
                tl.load(key_padding + offsets_n.to(tl.int64) * stride_pn, mask=offsets_n < seq_k, other=0) != 0
            )
        if mask is not None:
            tile = mask + offsets_m.to(tl.int64) * stride_mm + offsets_n.to(tl.int64) * stride_mn
            visible = visible & (tl.load(tile, mask=inside, other=0) != 0)
        p = tl.where(visible, p, 0.0)
    p_dropped = p
    if seed is not None:
        keep = keep_probability(tl.load(seed), offsets_m, offsets_n, batch_head, dropout_p)
        p_dropped = tl.where(keep, p / (1.0 - dropout_p), 0.0)
        dp = tl.where(keep, dp / (1.0 - dropout_p), 0.0)
    ds = p * (dp - row_delta)
    if MASKED:
        # A masked pair contributes nothing, even where K, V or the incoming gradient hold NaN or inf.
        ds = tl.where(visible, ds, 0.0)
    return p_dropped, ds, ds * slope


@triton.jit
def delta_kernel(
    out, grad_out, grad_lse, delta, lse, lse_log2,
    stride_ob, stride_om, stride_oh, stride_od, stride_gb, stride_gm, stride_gh, stride_gd, stride_lb, stride_lh, stride_lm,
    heads, seq_q, head_dim, BLOCK_M: tl.constexpr, PAD_D: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(dO · O) - dlse, and lse in log2 units with +inf for empty rows."""
    tile_m = tl.program_id(0) % tl.cdiv(seq_q, BLOCK_M)
    batch_head = tl.program_id(0) // tl.cdiv(seq_q, BLOCK_M)
    batch = (batch_head // heads).to(tl.int64)
    head = (batch_head % heads).to(tl.int64)
    offsets_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    wide_m = offsets_m.to(tl.int64)[:, None]
    columns = tl.arange(0, PAD_D)[None, :]
    inside = (offsets_m[:, None] < seq_q) & (columns < head_dim)
    # (BLOCK_M, PAD_D) both
    o = tl.load(
        out + batch * stride_ob + head * stride_oh + wide_m * stride_om + columns * stride_od, mask=inside, other=0.0
    )
    do = tl.load(
        grad_out + batch * stride_gb + head * stride_gh + wide_m * stride_gm + columns * stride_gd,
        mask=inside,
        other=0.0,
    )
    row_delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), axis=1)
    if grad_lse is not None:
        row_delta -= tl.load(
            grad_lse + batch * stride_lb + head * stride_lh + offsets_m * stride_lm, mask=offsets_m < seq_q, other=0.0
        )
    flat = batch_head.to(tl.int64) * seq_q + offsets_m
    tl.store(delta + flat, row_delta, mask=offsets_m < seq_q)
    row_lse = tl.load(lse + flat, mask=offsets_m < seq_q, other=float("inf"))
    tl.store(
        lse_log2 + flat,
        tl.where(row_lse == float("-inf"), float("inf"), row_lse * LOG2_E_DEVICE),
        mask=offsets_m < seq_q,
    )


@triton.jit
def key_gradient_kernel(
    query, key, value, grad_out, lse_log2, delta, grad_key, grad_value, key_padding, mask, bias, seed,
    stride_qb, stride_qm, stride_qh, stride_qd, stride_kb, stride_kn, stride_kh, stride_kd,
    stride_vb, stride_vn, stride_vh, stride_vd, stride_gb, stride_gm, stride_gh, stride_gd,
    stride_pb, stride_pn, stride_mb, stride_mh, stride_mm, stride_mn, stride_bb, stride_bh, stride_bm, stride_bn,
    scale, scale_log2, softcap, window_left, window_right, dropout_p,
    heads, group, seq_q, seq_k, head_dim, head_dim_v,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PAD_D: tl.constexpr, PAD_DV: tl.constexpr,
    EVEN_D: tl.constexpr, EVEN_DV: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program per (tile of keys, key head, batch): dK and dV of the tile, summed over queries and over shared heads."""
    EVERY_TILE_MASKED: tl.constexpr = (key_padding is not None) or (mask is not None)
    num_tiles = tl.cdiv(seq_k, BLOCK_N)
    heads_kv = heads // group
    start_n = (tl.program_id(0) % num_tiles) * BLOCK_N
    batch_head_kv = tl.program_id(0) // num_tiles
    batch = (batch_head_kv // heads_kv).to(tl.int64)
    head_kv = (batch_head_kv % heads_kv).to(tl.int64)
    offsets_n = start_n + tl.arange(0, BLOCK_N)
    # (BLOCK_N, PAD_D), (BLOCK_N, PAD_DV)
    k = load_rows(
        key + batch * stride_kb + head_kv * stride_kh,
        offsets_n,
        stride_kn,
        stride_kd,
        seq_k,
        head_dim,
        PAD_D,
        EVEN_D,
        WIDE,
    )
    v = load_rows(
        value + batch * stride_vb + head_kv * stride_vh,
        offsets_n,
        stride_vn,
        stride_vd,
        seq_k,
        head_dim_v,
        PAD_DV,
        EVEN_DV,
        WIDE,
    )
    if key_padding is not None:
        key_padding += batch * stride_pb
    dk = tl.zeros([BLOCK_N, PAD_D], tl.float32)
    dv = tl.zeros([BLOCK_N, PAD_DV], tl.float32)
    first, first_full, last_full, last = query_block_range(
        start_n, seq_q, seq_k, window_left, window_right, BLOCK_M, BLOCK_N, HAS_LEFT, HAS_RIGHT
    )
    if key_padding is not None:
        any_visible = tl.max(
            tl.load(key_padding + offsets_n.to(tl.int64) * stride_pn, mask=offsets_n < seq_k, other=0).to(tl.int32),
            axis=0,
        )
        last = tl.where(any_visible == 0, first, last)
    for member in range(group):
        head = head_kv * group + member
        batch_head = (batch * heads + head).to(tl.int32)
        query_head = query + batch * stride_qb + head * stride_qh
        grad_head = grad_out + batch * stride_gb + head * stride_gh
        rows_base = (batch * heads + head) * seq_q
        mask_head = mask
        bias_head = bias
        if mask is not None:
            mask_head = mask + batch * stride_mb + head * stride_mh
        if bias is not None:
            bias_head = bias + batch * stride_bb + head * stride_bh
        for part in tl.static_range(3):
            if EVERY_TILE_MASKED:
                begin, end = first, last
            elif part == 0:
                begin, end = first, first_full
            elif part == 1:
                begin, end = first_full, last_full
            else:
                begin, end = last_full, last
            if part == 1 or not EVERY_TILE_MASKED:
                for block in tl.range(begin, end, num_stages=STAGES):
                    offsets_m = block * BLOCK_M + tl.arange(0, BLOCK_M)
                    # (BLOCK_M, PAD_D), (BLOCK_M, PAD_DV)
                    q = load_rows(query_head, offsets_m, stride_qm, stride_qd, seq_q, head_dim, PAD_D, EVEN_D, WIDE)
                    do = load_rows(grad_head, offsets_m, stride_gm, stride_gd, seq_q, head_dim_v, PAD_DV, EVEN_DV, WIDE)
                    row_lse = tl.load(lse_log2 + rows_base + offsets_m, mask=offsets_m < seq_q, other=float("inf"))
                    row_delta = tl.load(delta + rows_base + offsets_m, mask=offsets_m < seq_q, other=0.0)
                    # (BLOCK_N, BLOCK_M) both
                    s = tl.dot(k, q.T, input_precision=PRECISION)
                    dp = tl.dot(v, do.T, input_precision=PRECISION)
                    p, _, ds = probabilities_and_gradient(
                        s, dp, row_lse[None, :], row_delta[None, :], offsets_m[None, :], offsets_n[:, None],
                        key_padding, mask_head, bias_head, seed, batch_head,
                        stride_pn, stride_mm, stride_mn, stride_bm, stride_bn,
                        scale_log2, softcap, window_left, window_right, dropout_p, seq_q, seq_k,
                        EVERY_TILE_MASKED or part != 1, HAS_LEFT, HAS_RIGHT, SOFTCAP,
                    )  # fmt: skip
                    dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
                    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    columns = tl.arange(0, PAD_D)[None, :]
    columns_v = tl.arange(0, PAD_DV)[None, :]
    rows = (batch * seq_k + offsets_n.to(tl.int64)) * heads_kv + head_kv
    inside = offsets_n[:, None] < seq_k
    tl.store(
        grad_key + rows[:, None] * head_dim + columns,
        (dk * scale).to(grad_key.dtype.element_ty), mask=inside & (columns < head_dim),
    )  # fmt: skip
    tl.store(
        grad_value + rows[:, None] * head_dim_v + columns_v,
        dv.to(grad_value.dtype.element_ty), mask=inside & (columns_v < head_dim_v),
    )  # fmt: skip


@triton.jit
def query_gradient_kernel(
    query, key, value, grad_out, lse_log2, delta, grad_query, key_padding, mask, bias, seed,
    stride_qb, stride_qm, stride_qh, stride_qd, stride_kb, stride_kn, stride_kh, stride_kd,
    stride_vb, stride_vn, stride_vh, stride_vd, stride_gb, stride_gm, stride_gh, stride_gd,
    stride_pb, stride_pn, stride_mb, stride_mh, stride_mm, stride_mn, stride_bb, stride_bh, stride_bm, stride_bn,
    scale, scale_log2, softcap, window_left, window_right, dropout_p,
    heads, group, seq_q, seq_k, head_dim, head_dim_v,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PAD_D: tl.constexpr, PAD_DV: tl.constexpr,
    EVEN_D: tl.constexpr, EVEN_DV: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program per (tile of queries, head, batch): dQ of the tile, summed over keys."""
    EVERY_TILE_MASKED: tl.constexpr = (key_padding is not None) or (mask is not None)
    num_tiles = tl.cdiv(seq_q, BLOCK_M)
    tile_m = tl.program_id(0) % num_tiles
    if HAS_RIGHT:
        tile_m = num_tiles - 1 - tile_m
    start_m = tile_m * BLOCK_M
    batch_head = tl.program_id(0) // num_tiles
    batch = (batch_head // heads).to(tl.int64)
    head = (batch_head % heads).to(tl.int64)
    head_kv = head // group
    offsets_m = start_m + tl.arange(0, BLOCK_M)
    # (BLOCK_M, PAD_D), (BLOCK_M, PAD_DV)
    q = load_rows(
        query + batch * stride_qb + head * stride_qh,
        offsets_m,
        stride_qm,
        stride_qd,
        seq_q,
        head_dim,
        PAD_D,
        EVEN_D,
        WIDE,
    )
    do = load_rows(
        grad_out + batch * stride_gb + head * stride_gh,
        offsets_m,
        stride_gm,
        stride_gd,
        seq_q,
        head_dim_v,
        PAD_DV,
        EVEN_DV,
        WIDE,
    )
    flat = (batch * heads + head) * seq_q + offsets_m
    row_lse = tl.load(lse_log2 + flat, mask=offsets_m < seq_q, other=float("inf"))
    row_delta = tl.load(delta + flat, mask=offsets_m < seq_q, other=0.0)
    key_head = key + batch * stride_kb + head_kv * stride_kh
    value_head = value + batch * stride_vb + head_kv * stride_vh
    if key_padding is not None:
        key_padding += batch * stride_pb
    if mask is not None:
        mask += batch * stride_mb + head * stride_mh
    if bias is not None:
        bias += batch * stride_bb + head * stride_bh
    dq = tl.zeros([BLOCK_M, PAD_D], tl.float32)
    first, first_full, last_full, last = key_block_range(
        start_m, seq_k, window_left, window_right, BLOCK_M, BLOCK_N, HAS_LEFT, HAS_RIGHT
    )
    for part in tl.static_range(3):
        if EVERY_TILE_MASKED:
            begin, end = first, last
        elif part == 0:
            begin, end = first, first_full
        elif part == 1:
            begin, end = first_full, last_full
        else:
            begin, end = last_full, last
        if part == 1 or not EVERY_TILE_MASKED:
            for block in tl.range(begin, end, num_stages=STAGES):
                offsets_n = block * BLOCK_N + tl.arange(0, BLOCK_N)
                # (BLOCK_N, PAD_D), (BLOCK_N, PAD_DV)
                k = load_rows(key_head, offsets_n, stride_kn, stride_kd, seq_k, head_dim, PAD_D, EVEN_D, WIDE)
                v = load_rows(value_head, offsets_n, stride_vn, stride_vd, seq_k, head_dim_v, PAD_DV, EVEN_DV, WIDE)
                if key_padding is not None:
                    in_padding = tl.load(
                        key_padding + offsets_n.to(tl.int64) * stride_pn, mask=offsets_n < seq_k, other=0
                    )
                    # What lies in padding may be NaN, and 0 · NaN is NaN.
                    k = tl.where((in_padding != 0)[:, None], k, 0.0)
                # (BLOCK_M, BLOCK_N) both
                s = tl.dot(q, k.T, input_precision=PRECISION)
                dp = tl.dot(do, v.T, input_precision=PRECISION)
                _, _, ds = probabilities_and_gradient(
                    s, dp, row_lse[:, None], row_delta[:, None], offsets_m[:, None], offsets_n[None, :],
                    key_padding, mask, bias, seed, batch_head, stride_pn, stride_mm, stride_mn, stride_bm, stride_bn,
                    scale_log2, softcap, window_left, window_right, dropout_p, seq_q, seq_k,
                    EVERY_TILE_MASKED or part != 1, HAS_LEFT, HAS_RIGHT, SOFTCAP,
                )  # fmt: skip
                dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    columns = tl.arange(0, PAD_D)[None, :]
    rows = (batch * seq_q + offsets_m.to(tl.int64)) * heads + head
    tl.store(
        grad_query + rows[:, None] * head_dim + columns,
        (dq * scale).to(grad_query.dtype.element_ty), mask=(offsets_m[:, None] < seq_q) & (columns < head_dim),
    )  # fmt: skip


@triton.jit
def bias_gradient_kernel(
    query, key, value, grad_out, lse_log2, delta, grad_bias, key_padding, mask, bias, seed,
    stride_qb, stride_qm, stride_qh, stride_qd, stride_kb, stride_kn, stride_kh, stride_kd,
    stride_vb, stride_vn, stride_vh, stride_vd, stride_gb, stride_gm, stride_gh, stride_gd,
    stride_pb, stride_pn, stride_mb, stride_mh, stride_mm, stride_mn, stride_bb, stride_bh, stride_bm, stride_bn,
    stride_db, stride_dh, stride_dm, stride_dn,
    scale_log2, softcap, window_left, window_right, dropout_p,
    batches, heads, group, seq_q, seq_k, head_dim, head_dim_v,
    sum_b, sum_h, sum_m, sum_n, tiles_m, tiles_n, bias_heads,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PAD_D: tl.constexpr, PAD_DV: tl.constexpr,
    EVEN_D: tl.constexpr, EVEN_DV: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, SUM_M: tl.constexpr, SUM_N: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per tile of the bias as it was given: dS summed over the sum_* batches, heads and tiles it was read for."""
    tile_n = tl.program_id(0) % tiles_n
    tile_m = (tl.program_id(0) // tiles_n) % tiles_m
    bias_head = (tl.program_id(0) // (tiles_n * tiles_m)) % bias_heads
    bias_batch = tl.program_id(0) // (tiles_n * tiles_m * bias_heads)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for batch_step in range(sum_b):
        batch = (bias_batch + batch_step).to(tl.int64)
        for head_step in range(sum_h):
            head = (bias_head + head_step).to(tl.int64)
            head_kv = head // group
            batch_head = (batch * heads + head).to(tl.int32)
            padding = key_padding
            mask_head = mask
            if key_padding is not None:
                padding = key_padding + batch * stride_pb
            if mask is not None:
                mask_head = mask + batch * stride_mb + head * stride_mh
            for step_m in range(sum_m):
                offsets_m = (tile_m + step_m) * BLOCK_M + tl.arange(0, BLOCK_M)
                flat = (batch * heads + head) * seq_q + offsets_m
                row_lse = tl.load(lse_log2 + flat, mask=offsets_m < seq_q, other=float("inf"))
                row_delta = tl.load(delta + flat, mask=offsets_m < seq_q, other=0.0)
                q = load_rows(
                    query + batch * stride_qb + head * stride_qh,
                    offsets_m,
                    stride_qm,
                    stride_qd,
                    seq_q,
                    head_dim,
                    PAD_D,
                    EVEN_D,
                    WIDE,
                )
                do = load_rows(
                    grad_out + batch * stride_gb + head * stride_gh,
                    offsets_m,
                    stride_gm,
                    stride_gd,
                    seq_q,
                    head_dim_v,
                    PAD_DV,
                    EVEN_DV,
                    WIDE,
                )
                for step_n in range(sum_n):
                    offsets_n = (tile_n + step_n) * BLOCK_N + tl.arange(0, BLOCK_N)
                    k = load_rows(
                        key + batch * stride_kb + head_kv * stride_kh,
                        offsets_n,
                        stride_kn,
                        stride_kd,
                        seq_k,
                        head_dim,
                        PAD_D,
                        EVEN_D,
                        WIDE,
                    )
                    v = load_rows(
                        value + batch * stride_vb + head_kv * stride_vh,
                        offsets_n,
                        stride_vn,
                        stride_vd,
                        seq_k,
                        head_dim_v,
                        PAD_DV,
                        EVEN_DV,
                        WIDE,
                    )
                    # (BLOCK_M, BLOCK_N) both
                    s = tl.dot(q, k.T, input_precision=PRECISION)
                    dp = tl.dot(do, v.T, input_precision=PRECISION)
                    _, ds, _ = probabilities_and_gradient(
                        s, dp, row_lse[:, None], row_delta[:, None], offsets_m[:, None], offsets_n[None, :],
                        padding, mask_head, bias + batch * stride_bb + head * stride_bh, seed, batch_head,
                        stride_pn, stride_mm, stride_mn, stride_bm, stride_bn,
                        scale_log2, softcap, window_left, window_right, dropout_p, seq_q, seq_k,
                        True, HAS_LEFT, HAS_RIGHT, SOFTCAP,
                    )  # fmt: skip
                    total += ds
    base = grad_bias + bias_batch.to(tl.int64) * stride_db + bias_head.to(tl.int64) * stride_dh
    offsets_m = (tile_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    offsets_n = (tile_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    if SUM_M and SUM_N:
        tl.store(base, tl.sum(total))
    elif SUM_M:
        tl.store(base + offsets_n * stride_dn, tl.sum(total, axis=0), mask=offsets_n < seq_k)
    elif SUM_N:
        tl.store(base + offsets_m * stride_dm, tl.sum(total, axis=1), mask=offsets_m < seq_q)
    else:
        tl.store(
            base + offsets_m[:, None] * stride_dm + offsets_n[None, :] * stride_dn, total,
            mask=(offsets_m[:, None] < seq_q) & (offsets_n[None, :] < seq_k),
        )  # fmt: skip


def flash_attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
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
    grad_lse: Tensor | None = None,
    bias_requires_grad: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients (dq, dk, dv, dbias) of flash_attention_forward, whose arguments and results (out, lse) it takes.

    `grad_lse` (B, H, Sq) float32 is the gradient of the returned lse, if that was used. dbias has the shape and dtype of
    bias, and is None unless `bias_requires_grad`. Bitwise repeatable.
    """
    batch, seq_q, heads, head_dim = query.shape
    seq_k, heads_kv, head_dim_v = value.shape[1:]
    device = query.device
    dq = torch.empty(query.shape, dtype=query.dtype, device=device)
    dk = torch.empty(key.shape, dtype=key.dtype, device=device)
    dv = torch.empty(value.shape, dtype=value.dtype, device=device)
    dbias = None
    if bias is not None and bias_requires_grad:
        dbias = torch.empty(bias.shape, dtype=torch.float32, device=device)
    if out.numel() == 0 or seq_k == 0:
        empty_bias = None if bias is None or dbias is None else dbias.zero_().to(bias.dtype)
        return dq.zero_(), dk.zero_(), dv.zero_(), empty_bias
    keys = KeyRange.of(is_causal, window_size)
    pad_d, pad_dv = padded_head_dim(head_dim), padded_head_dim(head_dim_v)
    delta = torch.empty((batch, heads, seq_q), dtype=torch.float32, device=device)
    lse_log2 = torch.empty_like(delta)
    grad_strides = (0, 0, 0) if grad_lse is None else grad_lse.stride()
    lse = lse.contiguous()
    seen = facts(query, key, value, grad_out, out, lse, grad_lse, key_padding, mask, bias)
    launch(
        delta_kernel, (blocks_of(seq_q, 32) * batch * heads,), device, seen,
        (
            out, grad_out, grad_lse, delta, lse, lse_log2,
            *out.stride(), *grad_out.stride(), *grad_strides, heads, seq_q, head_dim_v,
        ),
        {"BLOCK_M": 32, "PAD_D": pad_dv}, {},
    )  # fmt: skip
    shape = (batch, heads, seq_q, seq_k)
    seed = dropout_seed_tensor(dropout_p, dropout_seed, device)
    masks = (as_bytes(key_padding), as_bytes(mask), bias, seed)
    strides = (
        *query.stride(), *key.stride(), *value.stride(), *grad_out.stride(),
        *padding_strides(key_padding, batch, seq_k), *broadcast_strides(mask, shape, "mask"),
        *broadcast_strides(bias, shape, "bias"),
    )  # fmt: skip
    settings = (scale * LOG2_E, float(softcap), keys.left, keys.right, float(dropout_p))
    sizes = (heads, heads // heads_kv, seq_q, seq_k, head_dim, head_dim_v)
    flags = {
        "PAD_D": pad_d, "PAD_DV": pad_dv, "EVEN_D": pad_d == head_dim, "EVEN_DV": pad_dv == head_dim_v,
        "HAS_LEFT": keys.left >= 0, "HAS_RIGHT": keys.right >= 0, "SOFTCAP": softcap > 0,
        "WIDE": needs_wide_offsets(query, key, value, grad_out) or max(x.numel() for x in (query, key, value)) >= 2**31,
        "PRECISION": "ieee",
    }  # fmt: skip
    inputs = (query, key, value, grad_out, lse_log2, delta)
    key_tile, query_tile = backward_tiles(query, max(pad_d, pad_dv))
    seen = (seen, facts(seed), keys, *flags.values())
    for kernel, gradients, tile, tiles in (
        (key_gradient_kernel, (dk, dv), key_tile, blocks_of(seq_k, key_tile["BLOCK_N"]) * batch * heads_kv),
        (query_gradient_kernel, (dq,), query_tile, blocks_of(seq_q, query_tile["BLOCK_M"]) * batch * heads),
    ):
        constants = {"BLOCK_M": tile["BLOCK_M"], "BLOCK_N": tile["BLOCK_N"], **flags, "STAGES": tile["STAGES"]}
        launch(
            kernel, (tiles,), device, (seen, *constants.values(), *tile["options"].values()),
            (*inputs, *gradients, *masks, *strides, float(scale), *settings, *sizes), constants, tile["options"],
        )  # fmt: skip
    if bias is not None and dbias is not None:
        block = 32 if query.dtype == torch.float32 else 64
        summed = [bias.shape[d] == 1 for d in range(4)]
        tiles_m, tiles_n = blocks_of(seq_q, block), blocks_of(seq_k, block)
        sums = [
            batch if summed[0] else 1,
            heads if summed[1] else 1,
            tiles_m if summed[2] else 1,
            tiles_n if summed[3] else 1,
        ]
        grid_m, grid_n = 1 if summed[2] else tiles_m, 1 if summed[3] else tiles_n
        constants = {"BLOCK_M": block, "BLOCK_N": block, **flags, "SUM_M": summed[2], "SUM_N": summed[3]}
        launch(
            bias_gradient_kernel, (bias.shape[0] * bias.shape[1] * grid_m * grid_n,), device, (seen, *constants.values()),
            (
                *inputs, dbias, *masks, *strides, *dbias.stride(), *settings, batch, *sizes,
                *sums, grid_m, grid_n, bias.shape[1],
            ),
            constants, {"num_warps": 4},
        )  # fmt: skip
        dbias = dbias.to(bias.dtype)
    return dq, dk, dv, dbias
