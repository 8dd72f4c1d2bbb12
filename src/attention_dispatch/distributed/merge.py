r"""Merging attention over disjoint sets of keys by their log-sum-exp.

With partial results :math:`(o_a, \ell_a)` and :math:`(o_b, \ell_b)` over disjoint keys,

.. math:: \ell = \log(e^{\ell_a} + e^{\ell_b}), \qquad o = e^{\ell_a - \ell} o_a + e^{\ell_b - \ell} o_b

is attention over the union (Rabe and Staats, https://arxiv.org/abs/2112.05682). Both weights are at most 1, so nothing
overflows; a row without keys has LSE -inf and weight 0, and two such rows merge to output 0 and LSE -inf.
"""

from __future__ import annotations

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype in which partial results are summed: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def merge_attention(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint sets of keys.

    Args:
        out_a, out_b: (B, S, H, D), any floating dtype.
        lse_a, lse_b: (B, H, S), natural log; -inf where a row has no key.

    Returns:
        ``(out, lse)`` in the accumulation dtype (float32, or float64 for float64 input).
    """
    dtype = accumulation_dtype(out_a.dtype)
    lse, weight_a, weight_b = _weights(lse_a.to(dtype), lse_b.to(dtype))
    return out_a.to(dtype) * weight_a + out_b.to(dtype) * weight_b, lse


def _weights(lse_a: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Merged LSE (B, H, S) and the weights (B, S, H, 1) of both sides."""
    lse = torch.logaddexp(lse_a, lse_b)
    # -inf - -inf is NaN: rows empty on both sides are measured against 0 instead, which gives both weight 0.
    base = lse.masked_fill(lse == -torch.inf, 0.0)
    weight_a, weight_b = torch.exp(lse_a - base), torch.exp(lse_b - base)
    return lse, weight_a.transpose(1, 2).unsqueeze(-1), weight_b.transpose(1, 2).unsqueeze(-1)


class RunningAttention:
    """Attention accumulated block by block into one output.

    The first block is kept as the kernel returned it: a step that needs one block costs no conversion. Sums are kept in
    float32 (float64 for float64 input) from the second block on.
    """

    def __init__(self, rows: int):
        self._rows = rows
        self._out: Tensor | None = None
        self._lse: Tensor | None = None
        self._summed = False

    def add(self, rows: slice, out: Tensor, lse: Tensor | None) -> None:
        """Merge a block's result for a slice of query rows.

        Args:
            rows: local query rows of the block.
            out: (B, rows, H, D).
            lse: (B, H, rows), natural log; may be None only when one block is all there is.
        """
        if self._out is None and rows.stop - rows.start == self._rows:
            self._out, self._lse = out, lse
            return
        assert lse is not None
        self._start_sum(out)
        assert self._out is not None and self._lse is not None
        part, part_lse = self._out[:, rows], self._lse[:, :, rows]
        new_lse, weight_old, weight_new = _weights(part_lse, lse.to(part_lse.dtype))
        part.mul_(weight_old).addcmul_(out.to(part.dtype), weight_new)
        part_lse.copy_(new_lse)

    def _start_sum(self, like: Tensor) -> None:
        if self._summed:
            return
        self._summed = True
        dtype = accumulation_dtype(like.dtype)
        if self._out is not None:
            assert self._lse is not None
            self._out = self._out.to(dtype, copy=True)
            self._lse = self._lse.to(dtype, copy=True)
            return
        batch, _, heads, head_dim = like.shape
        self._out = torch.zeros(batch, self._rows, heads, head_dim, dtype=dtype, device=like.device)
        self._lse = torch.full((batch, heads, self._rows), -torch.inf, dtype=dtype, device=like.device)

    def result(self, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """``(out, lse)``: out in ``dtype``, lse as accumulated; both None when nothing was added."""
        return (None if self._out is None else self._out.to(dtype)), self._lse
