"""Pieces shared by the forward and backward kernels: which keys a query sees, and how a raw product becomes a score."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def tanh(x):
    """tanh from one exponential of a non-positive argument: no overflow, absolute error below 3e-7."""
    decay = tl.math.exp2(-2.0 * LOG2_E * tl.abs(x))
    magnitude = (1.0 - decay) / (1.0 + decay)
    return tl.where(x < 0, -magnitude, magnitude)


@triton.jit
def visible_by_position(
    offsets_m, offsets_n, seq_k, window_left, window_right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr
):
    """(M, N) bool: the key exists and lies in the query's window. Offsets arrive broadcast against each other."""
    visible = (offsets_n < seq_k) & (offsets_m >= 0)
    if HAS_LEFT:
        visible = visible & (offsets_n >= offsets_m - window_left)
    if HAS_RIGHT:
        visible = visible & (offsets_n <= offsets_m + window_right)
    return visible


@triton.jit
def key_block_range(
    start_m, seq_k, window_left, window_right,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
):  # fmt: skip
    """Key blocks seen by queries start_m .. start_m + BLOCK_M - 1: (first, first_full, last_full, last), half-open.

    Blocks in [first_full, last_full) are visible to each of these queries in full; those around them need a mask.
    """
    num_blocks = tl.cdiv(seq_k, BLOCK_N)
    first = 0
    first_full = 0
    last = num_blocks
    last_full = seq_k // BLOCK_N
    if HAS_LEFT:
        first = tl.minimum(tl.maximum(start_m - window_left, 0) // BLOCK_N, num_blocks)
        first_full = tl.cdiv(tl.maximum(start_m + BLOCK_M - 1 - window_left, 0), BLOCK_N)
    if HAS_RIGHT:
        last = tl.minimum(tl.maximum(tl.cdiv(start_m + BLOCK_M + window_right, BLOCK_N), first), num_blocks)
        last_full = tl.minimum(tl.maximum(start_m + window_right + 1, 0) // BLOCK_N, last_full)
    first_full = tl.minimum(tl.maximum(first_full, first), last)
    last_full = tl.minimum(tl.maximum(last_full, first_full), last)
    return first, first_full, last_full, last


@triton.jit
def query_block_range(
    start_n, seq_q, seq_k, window_left, window_right,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
):  # fmt: skip
    """Query blocks that see keys start_n .. start_n + BLOCK_N - 1: (first, first_full, last_full, last), half-open."""
    num_blocks = tl.cdiv(seq_q, BLOCK_M)
    first = 0
    first_full = 0
    last = num_blocks
    last_full = seq_q // BLOCK_M
    if HAS_RIGHT:
        first = tl.minimum(tl.maximum(start_n - window_right, 0) // BLOCK_M, num_blocks)
        first_full = tl.cdiv(tl.maximum(start_n + BLOCK_N - 1 - window_right, 0), BLOCK_M)
    if HAS_LEFT:
        last = tl.minimum(tl.maximum(tl.cdiv(start_n + BLOCK_N + window_left, BLOCK_M), first), num_blocks)
        last_full = tl.minimum(tl.maximum(start_n + window_left + 1, 0) // BLOCK_M, last_full)
    # A key block that reaches past the sequence has no query block that sees it in full.
    last_full = tl.where(start_n + BLOCK_N > seq_k, 0, last_full)
    first_full = tl.minimum(tl.maximum(first_full, first), last)
    last_full = tl.minimum(tl.maximum(last_full, first_full), last)
    return first, first_full, last_full, last


@triton.jit
def keep_probability(seed, offsets_m, offsets_n, batch_head, dropout_p):
    """(M, N) bool of a philox stream indexed by (key, query, batch and head): the same for any tiling, and in backward."""
    zero = (offsets_m + offsets_n) * 0
    bits, _, _, _ = tl.philox(
        seed,
        (zero + offsets_n).to(tl.uint32),
        (zero + offsets_m).to(tl.uint32),
        (zero + batch_head).to(tl.uint32),
        zero.to(tl.uint32),
    )
    return tl.uint_to_uniform_float(bits) >= dropout_p
