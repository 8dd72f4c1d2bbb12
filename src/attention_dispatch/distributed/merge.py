r"""Merging attention over disjoint sets of keys by their log-sum-exp.

With partial results :math:`(o_a, \ell_a)` and :math:`(o_b, \ell_b)` over disjoint keys,

.. math:: \ell = \log(e^{\ell_a} + e^{\ell_b}), \qquad o = e^{\ell_a - \ell} o_a + e^{\ell_b - \ell} o_b

is attention over the union (Rabe and Staats, https://arxiv.org/abs/2112.05682). Both weights are at most 1, so nothing
overflows; a row without keys has LSE -inf and weight 0, and two such rows merge to output 0 and LSE -inf.
"""

from __future__ import annotations

import importlib.util
from functools import cache

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


@cache
def _has_kernel() -> bool:
    return importlib.util.find_spec("triton") is not None


def merge_into(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, into_out: Tensor, into_lse: Tensor) -> None:
    """Write attention over the union of two disjoint sets of keys into given tensors, which may be one of the inputs.

    Args:
        out_a, out_b, into_out: (B, S, H, D), any floating dtypes; summed in the accumulation dtype.
        lse_a, lse_b, into_lse: (B, H, S), natural log; -inf where a row has no key.
    """
    single = all(tensor.dtype == torch.float32 for tensor in (lse_a, lse_b, into_lse))
    dense = all(tensor.stride(3) == 1 for tensor in (out_a, out_b, into_out))
    if into_out.device.type == "cuda" and single and dense and into_out.numel() and _has_kernel():
        from .merge_kernel import merge_into as kernel

        kernel(out_a, lse_a, out_b, lse_b, into_out, into_lse)
        return
    dtype = into_lse.dtype
    lse, weight_a, weight_b = _weights(lse_a.to(dtype), lse_b.to(dtype))
    if into_out is out_a and into_out.dtype == dtype:
        into_out.mul_(weight_a).addcmul_(out_b.to(dtype), weight_b)
    else:
        into_out.copy_(out_a.to(dtype) * weight_a + out_b.to(dtype) * weight_b)
    into_lse.copy_(lse)


class RunningAttention:
    """Attention accumulated block by block into one output.

    A block that is all there is is kept as the kernel returned it, and one that completes the result is merged straight
    into it. Sums in between are kept in float32 (float64 for float64 input).

    Args:
        rows: number of query rows.
        into: ``(out, lse)`` to be filled, (B, rows, H, D) and (B, H, rows) in the accumulation dtype; None leaves it to
            :meth:`result` to return whatever tensors there are.
    """

    def __init__(self, rows: int, into: tuple[Tensor, Tensor] | None = None):
        self._rows, self._into = rows, into
        self._held: tuple[Tensor, Tensor | None] | None = None
        self._dtype: torch.dtype | None = None
        self._summed = False

    def add(self, rows: slice, out: Tensor, lse: Tensor | None, is_last: bool = False) -> None:
        """Merge a block's result for a slice of query rows.

        Args:
            rows: local query rows of the block.
            out: (B, rows, H, D).
            lse: (B, H, rows), natural log; may be None only when one block is all there is.
            is_last: nothing will be added any more.
        """
        whole = rows.stop - rows.start == self._rows
        if self._held is None:
            self._dtype = out.dtype
            if whole:
                self._held = out, lse
                return
        assert lse is not None
        if whole and (is_last or not self._summed):
            assert self._held is not None and self._held[1] is not None
            into = (self._into or self._empty(out, out.dtype)) if is_last else self._empty(out, None)
            merge_into(self._held[0], self._held[1], out, lse, *into)
            self._held, self._summed = into, True
            return
        total_out, total_lse = self._sums(out)
        part_out, part_lse = total_out[:, rows], total_lse[:, :, rows]
        merge_into(part_out, part_lse, out, lse, part_out, part_lse)

    def _empty(self, like: Tensor, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
        batch, _, heads, head_dim = like.shape
        accumulated = accumulation_dtype(like.dtype)
        return (
            like.new_empty(batch, self._rows, heads, head_dim, dtype=dtype or accumulated),
            like.new_empty(batch, heads, self._rows, dtype=accumulated),
        )

    def _sums(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """The sums in the accumulation dtype, made from what is held."""
        if not self._summed:
            total_out, total_lse = self._empty(like, None)
            if self._held is None:
                total_out.zero_()
                total_lse.fill_(-torch.inf)
            else:
                assert self._held[1] is not None
                total_out.copy_(self._held[0])
                total_lse.copy_(self._held[1])
            self._held, self._summed = (total_out, total_lse), True
        assert self._held is not None and self._held[1] is not None
        return self._held[0], self._held[1]

    def result(self) -> tuple[Tensor | None, Tensor | None]:
        """Output in the dtype of the blocks and LSE; None for what was never added, 0 and -inf in given tensors."""
        held, into = self._held, self._into
        if into is None:
            return (None, None) if held is None else (held[0].to(self._dtype), held[1])
        if held is None:
            into[0].zero_()
            into[1].fill_(-torch.inf)
        elif held is not into:
            into[0].copy_(held[0])
            if held[1] is not None:
                into[1].copy_(held[1])
        return into
