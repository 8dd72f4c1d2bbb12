"""Exact attention, forward, for Hopper: one warpgroup that loads, two that compute, taking turns on the tensor cores.

Algorithm: flash.py's, in the order of FlashAttention-3 (https://arxiv.org/abs/2407.08608). A program owns 128 queries. The loading
warpgroup keeps two tiles of K and of V in flight; each of the others owns 64 queries and, in one step, issues the scores of
tile n and the product of P and V of tile n - 1, then computes the softmax of tile n while the latter runs. Two named barriers
let one group's products be issued before the other's, so that one group's exponentials run under the other's products.

Numeric hazards: as in flash.py. Every query here sees a key, so no row is empty. What lies past the sequence reads as zero.
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
from .hopper_parts import along_rows, named_barrier, thread_sums
from .launch import facts, launch

_BLOCK_M = 128
_BLOCK_N = 128
_HEAD_DIM = 128
# 24 registers stay for each thread of the loading warpgroup.
_REGISTERS = 240
_ELEMENTS = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
_LN_2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def next_stage(stage, phase, STAGES: gl.constexpr):
    stage += 1
    if stage == STAGES:
        stage = 0
        phase ^= 1
    return stage, phase


@gluon.jit
def load_tiles(
    query, key, value, q_tile, k_tiles, v_tiles, q_ready, k_ready, v_ready, k_free, v_free,
    batch, head, head_kv, start_m, tiles, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The loading warpgroup: both tiles of queries, then K and V tile by tile, as buffers become free."""
    mbarrier.expect(q_ready, 2 * query.block_type.nbytes)
    for group in gl.static_range(2):
        tma.async_copy_global_to_shared(query, [batch, head, start_m + 64 * group, 0], q_ready, q_tile.index(group))
    stage = 0
    phase = 1
    for n in range(tiles):
        at = [batch, head_kv, n * BLOCK_N, 0]
        mbarrier.wait(k_free.index(stage), phase)
        mbarrier.expect(k_ready.index(stage), key.block_type.nbytes)
        tma.async_copy_global_to_shared(key, at, k_ready.index(stage), k_tiles.index(stage))
        mbarrier.wait(v_free.index(stage), phase)
        mbarrier.expect(v_ready.index(stage), value.block_type.nbytes)
        tma.async_copy_global_to_shared(value, at, v_ready.index(stage), v_tiles.index(stage))
        stage, phase = next_stage(stage, phase, STAGES)


@gluon.jit
def mask_scores(s, n, rows, seq_k, BLOCK_N: gl.constexpr, CAUSAL: gl.constexpr, S_L: gl.constexpr):
    """Scores of tile n with -inf where the key does not exist or, with CAUSAL, comes after the query."""
    columns = gl.expand_dims(n * BLOCK_N + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, S_L)), 0)
    rows = gl.expand_dims(rows, 1)
    visible = (columns < seq_k) & (rows >= 0)
    if CAUSAL:
        visible = visible & (columns <= rows)
    return gl.where(visible, s, float("-inf"))


@gluon.jit
def exponentials(s, running_max, scale_log2):
    """(P, decay of what was summed before, new maximum)."""
    new_max = gl.maximum(running_max, gl.max(s, axis=1) * scale_log2)
    p = gl.exp2(s * scale_log2 - gl.expand_dims(new_max, 1))
    return p, gl.exp2(running_max - new_max), new_max


@gluon.jit
def attend_rows(
    out, lse, q_tile, k_tiles, v_tiles, q_ready, k_ready, v_ready, k_free, v_free,
    stride_ob, stride_om, stride_oh, batch, head, batch_head, start_m, tiles, seq_q, seq_k, head_dim_v, scale_log2,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, PAD_D: gl.constexpr, GROUP: gl.constexpr,
    MASKED: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """A computing warpgroup: 64 queries against all tiles. MASKED: the last tile needs a mask."""
    S_L: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 16])
    O_L: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, PAD_D, 16])
    P_L: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=O_L, k_width=2)
    rows = start_m + GROUP * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, S_L))
    running_max = gl.full([64], float("-inf"), gl.float32, layout=gl.SliceLayout(1, S_L))
    nothing = gl.zeros([64, BLOCK_N], gl.float32, S_L)
    mbarrier.wait(q_ready, 0)
    q = q_tile.index(GROUP).reshape([64, PAD_D])
    mbarrier.wait(k_ready.index(0), 0)
    # Turns: group 0 waits at barrier 9 and group 1 at 10, each arrives at the other's once its products are issued.
    if GROUP == 1:
        named_barrier(False, 9)
    named_barrier(True, 9 + GROUP)
    k = k_tiles.index(0).reshape([BLOCK_N, PAD_D]).permute((1, 0))
    s_coming = warpgroup_mma(q, k, nothing, use_acc=False, is_async=True)
    named_barrier(False, 10 - GROUP)
    # (64, BLOCK_N)
    s = warpgroup_mma_wait(0, deps=(s_coming,))
    mbarrier.arrive(k_free.index(0), count=1)
    if MASKED:
        s = mask_scores(s, 0, rows, seq_k, BLOCK_N, CAUSAL, S_L)
    p, decay, running_max = exponentials(s, running_max, scale_log2)
    sums = thread_sums(p, 64, BLOCK_N)
    SUMS_L: gl.constexpr = sums.type.layout
    p16 = gl.convert_layout(p.to(v_tiles.dtype), P_L, assert_trivial=True)
    accumulator = gl.zeros([64, PAD_D], gl.float32, O_L)
    stage = 1 % STAGES
    phase = 1 // STAGES
    stage_v = 0
    phase_v = 0
    unmasked = tiles
    if MASKED:
        unmasked = tiles - 1
    for _n in range(1, unmasked):
        mbarrier.wait(k_ready.index(stage), phase)
        named_barrier(True, 9 + GROUP)
        k = k_tiles.index(stage).reshape([BLOCK_N, PAD_D]).permute((1, 0))
        s_coming = warpgroup_mma(q, k, nothing, use_acc=False, is_async=True)
        mbarrier.wait(v_ready.index(stage_v), phase_v)
        v = v_tiles.index(stage_v).reshape([BLOCK_N, PAD_D])
        accumulator = warpgroup_mma(p16, v, accumulator, is_async=True)
        named_barrier(False, 10 - GROUP)
        s = warpgroup_mma_wait(1, deps=(s_coming,))
        mbarrier.arrive(k_free.index(stage), count=1)
        p, decay, running_max = exponentials(s, running_max, scale_log2)
        sums = sums * along_rows(decay, SUMS_L) + thread_sums(p, 64, BLOCK_N)
        accumulator = warpgroup_mma_wait(0, deps=(accumulator,))
        mbarrier.arrive(v_free.index(stage_v), count=1)
        p16 = gl.convert_layout(p.to(v_tiles.dtype), P_L, assert_trivial=True)
        accumulator = accumulator * along_rows(decay, O_L)
        stage, phase = next_stage(stage, phase, STAGES)
        stage_v, phase_v = next_stage(stage_v, phase_v, STAGES)
    if MASKED and tiles > 1:
        mbarrier.wait(k_ready.index(stage), phase)
        named_barrier(True, 9 + GROUP)
        k = k_tiles.index(stage).reshape([BLOCK_N, PAD_D]).permute((1, 0))
        s_coming = warpgroup_mma(q, k, nothing, use_acc=False, is_async=True)
        mbarrier.wait(v_ready.index(stage_v), phase_v)
        v = v_tiles.index(stage_v).reshape([BLOCK_N, PAD_D])
        accumulator = warpgroup_mma(p16, v, accumulator, is_async=True)
        named_barrier(False, 10 - GROUP)
        s, accumulator = warpgroup_mma_wait(0, deps=(s_coming, accumulator))
        s = mask_scores(s, tiles - 1, rows, seq_k, BLOCK_N, CAUSAL, S_L)
        p, decay, running_max = exponentials(s, running_max, scale_log2)
        sums = sums * along_rows(decay, SUMS_L) + thread_sums(p, 64, BLOCK_N)
        p16 = gl.convert_layout(p.to(v_tiles.dtype), P_L, assert_trivial=True)
        accumulator = accumulator * along_rows(decay, O_L)
        stage_v, phase_v = next_stage(stage_v, phase_v, STAGES)
    if GROUP == 0:
        # Takes the arrival of the other group's last turn: none may be left over.
        named_barrier(True, 9)
    mbarrier.wait(v_ready.index(stage_v), phase_v)
    v = v_tiles.index(stage_v).reshape([BLOCK_N, PAD_D])
    accumulator = warpgroup_mma(p16, v, accumulator, is_async=True)
    running_sum = gl.convert_layout(gl.sum(sums, axis=1), gl.SliceLayout(1, S_L))
    accumulator = warpgroup_mma_wait(0, deps=(accumulator,))
    result = accumulator * along_rows(1.0 / running_sum, O_L)
    if lse is not None:
        row_lse = (running_max + gl.log2(running_sum)) * _LN_2
        gl.store(lse + batch_head.to(gl.int64) * seq_q + rows, row_lse, mask=rows < seq_q)
    rows = start_m + GROUP * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, O_L))
    columns = gl.expand_dims(gl.arange(0, PAD_D, layout=gl.SliceLayout(0, O_L)), 0)
    place = out + batch.to(gl.int64) * stride_ob + head.to(gl.int64) * stride_oh
    gl.store(
        place + gl.expand_dims(rows.to(gl.int64) * stride_om, 1) + columns,
        result.to(out.dtype.element_ty), mask=gl.expand_dims(rows < seq_q, 1) & (columns < head_dim_v),
    )  # fmt: skip


@gluon.jit(do_not_specialize=["heads", "group", "seq_q", "seq_k"])
def flash_hopper_kernel(
    query, key, value, out, lse, stride_ob, stride_om, stride_oh, scale_log2, heads, group, seq_q, seq_k, head_dim_v,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, PAD_D: gl.constexpr,
    MASKED: gl.constexpr, CAUSAL: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """One program per (tile of queries, head, batch); all tiles of a head run together, so that its K and V stay in L2."""
    num_tiles = gl.cdiv(seq_q, BLOCK_M)
    tile_m = gl.program_id(0) % num_tiles
    batch_head = gl.program_id(0) // num_tiles
    tiles = gl.cdiv(seq_k, BLOCK_N)
    if CAUSAL:
        # The last queries see the most keys: start them first.
        tile_m = num_tiles - 1 - tile_m
        tiles = gl.minimum(tiles, gl.cdiv((tile_m + 1) * BLOCK_M, BLOCK_N))
    start_m = tile_m * BLOCK_M
    batch = batch_head // heads
    head = batch_head % heads
    q_tile = gl.allocate_shared_memory(query.dtype, [2, 1, 1, 64, PAD_D], query.layout)
    k_tiles = gl.allocate_shared_memory(key.dtype, [STAGES, 1, 1, BLOCK_N, PAD_D], key.layout)
    v_tiles = gl.allocate_shared_memory(value.dtype, [STAGES, 1, 1, BLOCK_N, PAD_D], value.layout)
    q_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_ready, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(i), count=1)
        mbarrier.init(v_ready.index(i), count=1)
        mbarrier.init(k_free.index(i), count=2)
        mbarrier.init(v_free.index(i), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (load_tiles, (
                query, key, value, q_tile, k_tiles, v_tiles, q_ready, k_ready, v_ready, k_free, v_free,
                batch, head, head // group, start_m, tiles, BLOCK_N, STAGES,
            )),
            (attend_rows, (
                out, lse, q_tile, k_tiles, v_tiles, q_ready, k_ready, v_ready, k_free, v_free,
                stride_ob, stride_om, stride_oh, batch, head, batch_head, start_m, tiles, seq_q, seq_k, head_dim_v, scale_log2,
                BLOCK_N, STAGES, PAD_D, 0, MASKED, CAUSAL,
            )),
            (attend_rows, (
                out, lse, q_tile, k_tiles, v_tiles, q_ready, k_ready, v_ready, k_free, v_free,
                stride_ob, stride_om, stride_oh, batch, head, batch_head, start_m, tiles, seq_q, seq_k, head_dim_v, scale_log2,
                BLOCK_N, STAGES, PAD_D, 1, MASKED, CAUSAL,
            )),
        ],
        [4, 4], [REGISTERS, REGISTERS],
    )  # fmt: skip


@lru_cache(None)
def _tile_layout(rows: int, dtype: torch.dtype) -> Any:
    return gl.NVMMASharedLayout.get_default_for([1, 1, rows, _HEAD_DIM], _ELEMENTS[dtype])


def _descriptor(tensor: Tensor, rows: int) -> TensorDescriptor:
    """For (rows, 128) tiles of a BSHD tensor; what lies beyond seq or head_dim reads as zero."""
    batch, seq, heads, head_dim = tensor.shape
    step_b, step_s, step_h, step_d = tensor.stride()
    shape, steps = [batch, heads, seq, head_dim], [step_b, step_h, step_s, step_d]
    return TensorDescriptor(tensor, shape, steps, [1, 1, rows, _HEAD_DIM], _tile_layout(rows, tensor.dtype))


def takes(query: Tensor, value: Tensor) -> bool:
    """Head_dims for which this kernel is the faster one: at 64 the plain Triton kernel is (483 against 454 TFLOP/s at 1 x 16384)."""
    return 64 < query.shape[3] <= _HEAD_DIM and 64 < value.shape[3] <= _HEAD_DIM


def launch_flash_hopper(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor | None, scale: float, is_causal: bool
) -> None:
    """Write attention into `out` (B, Sq, H, Dv) and, where given, `lse` (B, H, Sq). Needs scale > 0 and tma_ready inputs."""
    batch, seq_q, heads, _ = query.shape
    seq_k, heads_kv, head_dim_v = value.shape[1:]
    constants = {
        "BLOCK_M": _BLOCK_M, "BLOCK_N": _BLOCK_N, "STAGES": 2, "PAD_D": _HEAD_DIM,
        "MASKED": is_causal or seq_k % _BLOCK_N != 0, "CAUSAL": is_causal, "REGISTERS": _REGISTERS,
    }  # fmt: skip
    launch(
        flash_hopper_kernel, (blocks_of(seq_q, _BLOCK_M) * batch * heads,), query.device,
        (facts(query, key, value), is_causal, lse is None),
        (
            _descriptor(query, 64), _descriptor(key, _BLOCK_N), _descriptor(value, _BLOCK_N), out, lse, *out.stride()[:3],
            scale * LOG2_E, heads, heads // heads_kv, seq_q, seq_k, head_dim_v,
        ),
        constants, {"num_warps": 4},
    )  # fmt: skip
