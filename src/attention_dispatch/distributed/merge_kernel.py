"""The merge of two partial results as one kernel: reads both once, writes the result once. Imports torch and Triton only.

Formula and treatment of empty rows as in :mod:`~.merge`. In plain torch the same merge is a dozen kernels that read and
write float32 copies of the outputs: 0.45 ms instead of 0.04 ms for 4 heads of 32,768 tokens on an H100 (2026-11-25).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS = 16


@triton.jit
def _merge(
    out_a, lse_a, out_b, lse_b, into_out, into_lse, rows, heads, head_dim,
    stride_ab, stride_as, stride_ah, stride_bb, stride_bs, stride_bh, stride_ib, stride_is, stride_ih,
    stride_lab, stride_lah, stride_las, stride_lbb, stride_lbh, stride_lbs, stride_lib, stride_lih, stride_lis,
    ROWS: tl.constexpr, PAD_D: tl.constexpr,
):  # fmt: skip
    """One program merges ROWS query rows of one head."""
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    row_a = tl.load(lse_a + batch * stride_lab + head * stride_lah + row * stride_las, mask=inside, other=0.0)
    row_b = tl.load(lse_b + batch * stride_lbb + head * stride_lbh + row * stride_lbs, mask=inside, other=0.0)
    largest = tl.maximum(row_a, row_b)
    # Rows empty on both sides are measured against 0: both weights are exp(-inf) = 0, and the LSE stays -inf.
    base = tl.where(largest == float("-inf"), 0.0, largest)
    weight_a, weight_b = tl.exp(row_a - base), tl.exp(row_b - base)
    total = weight_a + weight_b
    tl.store(
        into_lse + batch * stride_lib + head * stride_lih + row * stride_lis,
        tl.where(total == 0.0, float("-inf"), base + tl.log(total)),
        mask=inside,
    )
    scale = tl.where(total == 0.0, 0.0, 1.0 / total)
    column = tl.arange(0, PAD_D)
    valid = inside[:, None] & (column[None, :] < head_dim)
    # (ROWS, PAD_D)
    part_a = tl.load(
        out_a + batch * stride_ab + head * stride_ah + row[:, None] * stride_as + column[None, :], mask=valid, other=0.0
    ).to(tl.float32)
    part_b = tl.load(
        out_b + batch * stride_bb + head * stride_bh + row[:, None] * stride_bs + column[None, :], mask=valid, other=0.0
    ).to(tl.float32)
    merged = part_a * (weight_a * scale)[:, None] + part_b * (weight_b * scale)[:, None]
    tl.store(
        into_out + batch * stride_ib + head * stride_ih + row[:, None] * stride_is + column[None, :],
        merged.to(into_out.dtype.element_ty),
        mask=valid,
    )


def merge_into(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, into_out: Tensor, into_lse: Tensor) -> None:
    """Write the merge into ``into_out`` and ``into_lse``, which may be one of the inputs.

    Args:
        out_a, out_b, into_out: (B, S, H, D), floating, each of its own dtype and strides, D contiguous.
        lse_a, lse_b, into_lse: (B, H, S) float32.
    """
    batch, rows, heads, head_dim = into_out.shape
    with torch.cuda.device_of(into_out):
        _merge[(triton.cdiv(rows, _ROWS), batch * heads)](
            out_a, lse_a, out_b, lse_b, into_out, into_lse, rows, heads, head_dim,
            *out_a.stride()[:3], *out_b.stride()[:3], *into_out.stride()[:3],
            *lse_a.stride(), *lse_b.stride(), *into_lse.stride(),
            ROWS=_ROWS, PAD_D=triton.next_power_of_2(head_dim),
        )  # fmt: skip
