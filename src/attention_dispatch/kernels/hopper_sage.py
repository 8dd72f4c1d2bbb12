"""Quantised attention, forward, for Hopper: sage.py's FP8 scheme with layouts, copies and barriers written out.

A program is one warpgroup and owns 64 queries, which it quantises itself; three programs share a multiprocessor at head_dim 128,
four at 64, and run under each other's waits. Against the plain Triton kernel it saves the row sums' exchange between threads
(each thread keeps the sum of its own columns to the end) and the pass over the queries.

Numeric hazards: as in sage.py. Every query here sees a key, so no row is empty.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .arguments import LOG2_E, blocks_of
from .hopper_parts import along_rows, thread_sums
from .launch import facts, launch
from .quantise import KEY_BLOCK, Quantised

_BLOCK_M = 64
_STAGES = 2
# Caps that let three and four programs share a multiprocessor.
_REGISTERS = {128: 168, 64: 128}
_LN_2 = gl.constexpr(0.6931471805599453)
_LEAST_AMAX = gl.constexpr(1e-30)
_ROUND_SHIFT = gl.constexpr(12582912.0)


@gluon.jit
def load_pair(key, value, k_tile, v_tile, k_ready, v_ready, key_at, value_row, value_at):
    mbarrier.expect(k_ready, key.block_type.nbytes)
    mbarrier.expect(v_ready, value.block_type.nbytes)
    tma.async_copy_global_to_shared(key, [key_at, 0], k_ready, k_tile)
    tma.async_copy_global_to_shared(value, [value_row, value_at], v_ready, v_tile)


@gluon.jit
def next_stage(stage, phase, STAGES: gl.constexpr):
    stage += 1
    if stage == STAGES:
        stage = 0
        phase ^= 1
    return stage, phase


@gluon.jit
def exponentials(
    s, scale, running_max, rows, n, seq_k,
    BLOCK_N: gl.constexpr, MASKED: gl.constexpr, CAUSAL: gl.constexpr, S_L: gl.constexpr,
):  # fmt: skip
    """(2^8 P, decay of what was summed before, new maximum) of the integer products of tile n."""
    if MASKED:
        columns = gl.expand_dims(n * BLOCK_N + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, S_L)), 0)
        visible = (columns < seq_k) & (gl.expand_dims(rows, 1) >= 0)
        if CAUSAL:
            visible = visible & (columns <= gl.expand_dims(rows, 1))
        # Below every product of 128 pairs of int8
        s = gl.where(visible, s, -(2**22))
    # Integers have a maximum of three operands in one instruction, and need no conversion before it.
    new_max = gl.maximum(running_max, gl.max(s, axis=1).to(gl.float32) * scale)
    p = gl.exp2(s.to(gl.float32) * gl.expand_dims(scale, 1) + gl.expand_dims(8.0 - new_max, 1))
    if MASKED:
        p = gl.where(visible, p, 0.0)
    return p, gl.exp2(running_max - new_max), new_max


@gluon.jit
def fold_tile(
    accumulator, running_max, sums, q_tile, k_tile, v_tile, scale, rows, n, seq_k,
    BLOCK_N: gl.constexpr, PAD_D: gl.constexpr, MASKED: gl.constexpr, CAUSAL: gl.constexpr,
    S_L: gl.constexpr, O_L: gl.constexpr,
):  # fmt: skip
    """Fold key tile n into the running softmax; its products are complete on return."""
    P_L: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=O_L, k_width=4)
    nothing = gl.zeros([64, BLOCK_N], gl.int32, S_L)
    s_coming = warpgroup_mma(q_tile, k_tile.permute((1, 0)), nothing, use_acc=False, is_async=True)
    # (64, BLOCK_N)
    s = warpgroup_mma_wait(0, deps=(s_coming,))
    p, decay, running_max = exponentials(s, scale, running_max, rows, n, seq_k, BLOCK_N, MASKED, CAUSAL, S_L)
    # Into the order in which value tokens are stored: no data moves between threads.
    p8 = p.reshape([64, BLOCK_N // 16, 2, 4, 2]).permute([0, 1, 3, 2, 4]).reshape([64, BLOCK_N]).to(gl.float8e4nv)
    p8 = gl.convert_layout(p8, P_L, assert_trivial=True)
    fresh = gl.zeros([64, PAD_D], gl.float32, O_L)
    fresh = warpgroup_mma(p8, v_tile.permute((1, 0)), fresh, use_acc=False, is_async=True)
    SUMS_L: gl.constexpr = sums.type.layout
    sums = sums * along_rows(decay, SUMS_L) + thread_sums(p, 64, BLOCK_N)
    fresh = warpgroup_mma_wait(0, deps=(fresh,))
    return accumulator * along_rows(decay, O_L) + fresh, running_max, sums


@gluon.jit
def quantise_rows(
    query, q_tile, key_mean, rows_done, stride_qm, scale_log2, seq_q, head_dim,
    PAD_D: gl.constexpr, NEGATE: gl.constexpr, S_L: gl.constexpr,
):  # fmt: skip
    """Store 64 queries as int8 with one scale each; returns the scales and what smoothing the keys took away, in log2."""
    Q_L: gl.constexpr = gl.BlockedLayout([1, 16], [512 // PAD_D, PAD_D // 16], [4, 1], [1, 0])
    rows = rows_done + gl.arange(0, 64, layout=gl.SliceLayout(1, Q_L))
    columns = gl.arange(0, PAD_D, layout=gl.SliceLayout(0, Q_L))
    inside = gl.expand_dims(rows < seq_q, 1) & gl.expand_dims(columns < head_dim, 0)
    places = query + gl.expand_dims(rows.to(gl.int64) * stride_qm, 1) + gl.expand_dims(columns, 0)
    # (64, PAD_D)
    x = gl.load(places, mask=inside, other=0.0).to(gl.float32)
    if NEGATE:
        x = -x
    # The bits of magnitudes order like the floats, with inf and NaN on top.
    amax = gl.max(x.to(gl.int32, bitcast=True) & 0x7FFFFFFF, axis=1).to(gl.float32, bitcast=True)
    least = gl.maximum(amax, _LEAST_AMAX)
    q_tile.store((x * gl.expand_dims(127.0 / least, 1) + _ROUND_SHIFT).to(gl.int32, bitcast=True).to(gl.int8))
    row_scale = gl.convert_layout((least / 127.0 + amax * 0.0) * scale_log2, gl.SliceLayout(1, S_L))
    row_shift = gl.zeros([64], gl.float32, gl.SliceLayout(1, S_L))
    if key_mean is not None:
        shift = gl.sum(x * gl.expand_dims(gl.load(key_mean + columns), 0), axis=1) * scale_log2
        row_shift = gl.convert_layout(shift, gl.SliceLayout(1, S_L))
    return row_scale, row_shift


@gluon.jit(do_not_specialize=["heads", "group", "seq_q", "seq_k"])
def sage_hopper_kernel(
    query, key, value, key_mean, key_scales, value_scales, value_means, out, lse,
    stride_qb, stride_qm, stride_qh, stride_ob, stride_om, stride_oh, scale_log2,
    heads, group, seq_q, seq_k, head_dim, head_dim_v,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, PAD_D: gl.constexpr,
    MASKED: gl.constexpr, CAUSAL: gl.constexpr, NEGATE: gl.constexpr,
):  # fmt: skip
    """One program per (tile of queries, head, batch). MASKED: the last tile of keys needs a mask."""
    S_L: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 32])
    O_L: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, PAD_D, 32])
    num_tiles = gl.cdiv(seq_q, BLOCK_M)
    tile_m = gl.program_id(0) % num_tiles
    batch_head = gl.program_id(0) // num_tiles
    key_blocks = gl.cdiv(seq_k, BLOCK_N)
    tiles = key_blocks
    if CAUSAL:
        # The last queries see the most keys: start them first.
        tile_m = num_tiles - 1 - tile_m
        tiles = gl.minimum(tiles, gl.cdiv((tile_m + 1) * BLOCK_M, BLOCK_N))
    start_m = tile_m * BLOCK_M
    batch = batch_head // heads
    head = batch_head % heads
    batch_head_kv = batch * (heads // group) + head // group
    key_row = batch_head_kv * key_blocks * BLOCK_N
    value_row = batch_head_kv * PAD_D
    key_scales += batch_head_kv * key_blocks

    q_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, PAD_D], gl.int8)
    q_tile = gl.allocate_shared_memory(gl.int8, [BLOCK_M, PAD_D], q_layout)
    k_tiles = gl.allocate_shared_memory(key.dtype, [STAGES, BLOCK_N, PAD_D], key.layout)
    v_tiles = gl.allocate_shared_memory(value.dtype, [STAGES, PAD_D, BLOCK_N], value.layout)
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(i), count=1)
        mbarrier.init(v_ready.index(i), count=1)
    fence_async_shared()
    gl.thread_barrier()
    # Past the last tile the copies fetch that one again, and nobody reads it.
    for i in gl.static_range(STAGES):
        block = gl.minimum(i, key_blocks - 1)
        load_pair(
            key, value, k_tiles.index(i), v_tiles.index(i), k_ready.index(i), v_ready.index(i),
            key_row + block * BLOCK_N, value_row, block * BLOCK_N,
        )  # fmt: skip

    query += batch.to(gl.int64) * stride_qb + head.to(gl.int64) * stride_qh
    if key_mean is not None:
        key_mean += value_row
    row_scale, row_shift = quantise_rows(
        query, q_tile, key_mean, start_m, stride_qm, scale_log2, seq_q, head_dim, PAD_D, NEGATE, S_L
    )
    fence_async_shared()
    gl.thread_barrier()

    rows = start_m + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, S_L))
    running_max = gl.full([BLOCK_M], float("-inf"), gl.float32, layout=gl.SliceLayout(1, S_L))
    accumulator = gl.zeros([BLOCK_M, PAD_D], gl.float32, O_L)
    sums = thread_sums(gl.zeros([BLOCK_M, BLOCK_N], gl.float32, S_L), BLOCK_M, BLOCK_N)
    key_scale = gl.load(key_scales)
    stage = 0
    phase = 0
    unmasked = tiles
    if MASKED:
        unmasked = tiles - 1
    for n in range(unmasked):
        scale = row_scale * key_scale
        key_scale = gl.load(key_scales + gl.minimum(n + 1, key_blocks - 1))
        # Both waits here: a branch between the casts to FP8 and their use would split the packing of four bytes.
        mbarrier.wait(k_ready.index(stage), phase)
        mbarrier.wait(v_ready.index(stage), phase)
        accumulator, running_max, sums = fold_tile(
            accumulator, running_max, sums, q_tile, k_tiles.index(stage), v_tiles.index(stage), scale, rows, n, seq_k,
            BLOCK_N, PAD_D, False, False, S_L, O_L,
        )  # fmt: skip
        gl.thread_barrier()
        block = gl.minimum(n + STAGES, key_blocks - 1)
        load_pair(
            key, value, k_tiles.index(stage), v_tiles.index(stage), k_ready.index(stage), v_ready.index(stage),
            key_row + block * BLOCK_N, value_row, block * BLOCK_N,
        )  # fmt: skip
        stage, phase = next_stage(stage, phase, STAGES)
    if MASKED:
        mbarrier.wait(k_ready.index(stage), phase)
        mbarrier.wait(v_ready.index(stage), phase)
        accumulator, running_max, sums = fold_tile(
            accumulator, running_max, sums, q_tile, k_tiles.index(stage), v_tiles.index(stage),
            row_scale * key_scale, rows, tiles - 1, seq_k, BLOCK_N, PAD_D, True, CAUSAL, S_L, O_L,
        )  # fmt: skip
        stage, phase = next_stage(stage, phase, STAGES)
    # No copy may outlive the program.
    for _i in gl.static_range(STAGES - 1 if MASKED else STAGES):
        mbarrier.wait(k_ready.index(stage), phase)
        mbarrier.wait(v_ready.index(stage), phase)
        stage, phase = next_stage(stage, phase, STAGES)

    running_sum = gl.convert_layout(gl.sum(sums, axis=1), gl.SliceLayout(1, S_L))
    columns = gl.arange(0, PAD_D, layout=gl.SliceLayout(0, O_L))
    value_scale = gl.load(value_scales + value_row + columns)
    result = accumulator * along_rows(1.0 / running_sum, O_L) * gl.expand_dims(value_scale, 0)
    if value_means is not None:
        result += gl.expand_dims(gl.load(value_means + value_row + columns), 0)
    if lse is not None:
        exponent = running_max + gl.log2(running_sum) - 8.0 + row_shift
        gl.store(lse + batch_head.to(gl.int64) * seq_q + rows, exponent * _LN_2, mask=rows < seq_q)
    rows = start_m + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, O_L))
    out += batch.to(gl.int64) * stride_ob + head.to(gl.int64) * stride_oh
    gl.store(
        out + gl.expand_dims(rows.to(gl.int64) * stride_om, 1) + gl.expand_dims(columns, 0),
        result.to(out.dtype.element_ty), mask=gl.expand_dims(rows < seq_q, 1) & gl.expand_dims(columns < head_dim_v, 0),
    )  # fmt: skip


def takes(query: Tensor, key: Tensor, pad_d: int, pad_dv: int) -> bool:
    """Head_dims that round up to 64 or 128, alike for keys and values, contiguous in the queries; row numbers below 2^31."""
    rows = key.shape[0] * key.shape[2] * (key.shape[1] + KEY_BLOCK)
    return pad_d == pad_dv and pad_d in _REGISTERS and query.stride(3) == 1 and rows < 2**31


@lru_cache(None)
def _tile_layout(rows: int, columns: int, dtype: torch.dtype) -> Any:
    return gl.NVMMASharedLayout.get_default_for([rows, columns], gl.int8 if dtype == torch.int8 else gl.float8e4nv)


def _descriptor(tensor: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """For (rows, columns) tiles of a dense tensor, all but its last dimension taken as one."""
    width = tensor.shape[-1]
    layout = _tile_layout(rows, columns, tensor.dtype)
    return TensorDescriptor(tensor, [tensor.numel() // width, width], [width, 1], [rows, columns], layout)


def launch_sage_hopper(
    query: Tensor, value: Tensor, quantised: Quantised, out: Tensor, lse: Tensor | None, scale: float, is_causal: bool
) -> None:
    """Write attention of (B, Sq, H, D) queries into `out` (B, Sq, H, Dv) and, where given, `lse` (B, H, Sq)."""
    batch, seq_q, heads, head_dim = query.shape
    seq_k, heads_kv, head_dim_v = value.shape[1:]
    keys8, values8 = quantised.key, quantised.value
    assert values8 is not None
    pad_d = keys8.shape[-1]

    constants = {
        "BLOCK_M": _BLOCK_M, "BLOCK_N": KEY_BLOCK, "STAGES": _STAGES, "PAD_D": pad_d,
        "MASKED": is_causal or seq_k % KEY_BLOCK != 0, "CAUSAL": is_causal, "NEGATE": scale < 0,
    }  # fmt: skip
    launch(
        sage_hopper_kernel, (blocks_of(seq_q, _BLOCK_M) * batch * heads,), query.device,
        (facts(query, value), heads_kv, is_causal, lse is None, quantised.value_mean is None, scale < 0),
        (
            query, _descriptor(keys8, KEY_BLOCK, pad_d), _descriptor(values8, pad_d, KEY_BLOCK),
            None if lse is None else quantised.key_mean, quantised.key_scale, quantised.value_scale, quantised.value_mean,
            out, lse, *query.stride()[:3], *out.stride()[:3],
            abs(scale) * LOG2_E, heads, heads // heads_kv, seq_q, seq_k, head_dim, head_dim_v,
        ),
        constants, {"num_warps": 4, "maxnreg": _REGISTERS[pad_d]},
    )  # fmt: skip
