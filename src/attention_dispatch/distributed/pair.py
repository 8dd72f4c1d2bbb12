"""What context parallelism needs from an attention kernel: a forward with LSE, a backward from LSE, and its limits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..errors import Reason
from .merge import accumulation_dtype

# Elements of the score matrix that exact_backward holds at a time (float32: 256 MiB).
_BACKWARD_SCORES = 1 << 26


class BlockCall(NamedTuple):
    """Arguments of one kernel call besides the tensors.

    Attributes:
        mask: None; bool (B or 1, Sk) key padding; bool or float 4-D broadcastable to (B, Hq, Sq, Sk). True attends,
            floats are added to the scaled scores.
        mask_kind: ``"none"``, ``"key_padding"``, ``"bool"`` or ``"bias"``.
        is_causal: top-left causal; in a ring only ever set for Sq = Sk.
        window_size: ``(left, right)``, -1 unbounded, counted from the top left.
        scale: factor of q k^T.
        softcap: 0 is off.
        deterministic: the kernel must give the same bits every time.
        needs_lse: the LSE is used.
        needs_grad: the result will be differentiated, through ``backward`` or, if gradients are recorded during the
            call and the pair is ``differentiable``, through autograd.
    """

    mask: Tensor | None = None
    mask_kind: str = "none"
    is_causal: bool = False
    window_size: tuple[int, int] = (-1, -1)
    scale: float = 1.0
    softcap: float = 0.0
    deterministic: bool = False
    needs_lse: bool = True
    needs_grad: bool = False


class BlockFacts(NamedTuple):
    """What decides whether a kernel can serve a block: the properties of its :class:`BlockCall`, without tensors.

    ``lengths`` is ``"equal"``, ``"fewer_queries"`` or ``"more_queries"`` (than keys).
    """

    mask_kind: str
    is_causal: bool
    has_window: bool
    lengths: str
    softcap: bool
    deterministic: bool
    needs_lse: bool
    needs_grad: bool


class AttentionPair(Protocol):
    """A kernel as two tensor functions. Layout (B, S, H, D); LSE natural log, float32 or wider, (B, H, Sq).

    A query row without keys has output 0 and LSE -inf in ``forward``. Query heads are a multiple of the key heads.

    Attributes:
        name: for messages.
        differentiable: autograd can differentiate ``forward``; used where no results have to be merged.
    """

    name: str
    differentiable: bool

    def reasons_against(self, query: Tensor, key: Tensor, value: Tensor, facts: BlockFacts) -> Sequence[Reason]:
        """Why the kernel cannot serve such a block; empty when it can. The tensors give dtype, device and head dims."""
        ...

    def forward(self, query: Tensor, key: Tensor, value: Tensor, call: BlockCall) -> tuple[Tensor, Tensor | None]:
        """``(out, lse)`` of one block; lse may be None when ``call.needs_lse`` is false."""
        ...

    def backward(
        self, grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, call: BlockCall
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``(dq, dk, dv)`` of one block, with ``out`` and ``lse`` of the *whole* row, not of the block.

        The probabilities are exp(score - lse), so the block's share of the gradient follows without merging anything.
        Rows that have no key anywhere arrive with LSE +inf, which makes every probability 0.
        """
        ...


def scores_of(query: Tensor, key: Tensor, call: BlockCall, first_row: int = 0) -> tuple[Tensor, Tensor | None]:
    """Masked scores (B, Hkv, G, rows, Sk), and the derivative of the softcap (None without one).

    Args:
        query: (B, Hkv, G, rows, D), G query heads for each key head.
        key: (B, Hkv, 1, Sk, D).
        call: the block's arguments.
        first_row: position in the block of the first of these query rows.
    """
    scores = (query @ key.transpose(-1, -2)) * call.scale
    slope = None
    if call.softcap:
        squashed = torch.tanh(scores / call.softcap)
        scores, slope = call.softcap * squashed, 1 - squashed * squashed
    rows, columns = scores.shape[-2:]
    left, right = call.window_size
    if call.is_causal:
        right = 0
    if left >= 0 or right >= 0:
        offset = (
            torch.arange(columns, device=scores.device) - torch.arange(rows, device=scores.device)[:, None] - first_row
        )
        hidden = torch.zeros_like(offset, dtype=torch.bool)
        if left >= 0:
            hidden |= offset < -left
        if right >= 0:
            hidden |= offset > right
        scores = scores.masked_fill(hidden, -torch.inf)
    if call.mask is not None:
        mask = call.mask[:, None, None, :] if call.mask.ndim == 2 else call.mask
        if mask.shape[2] != 1:
            mask = mask[:, :, first_row : first_row + rows]
        # (B, 1 or Hq, ., .) -> (B, 1 or Hkv, 1 or G, ., .)
        heads, groups = scores.shape[1:3]
        mask = mask.unflatten(1, (heads, groups)) if mask.shape[1] != 1 else mask.unsqueeze(1)
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.to(scores.dtype)
    return scores, slope


def exact_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, call: BlockCall
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of any exact kernel's block in plain torch, for kernels that bring no backward of their own.

    Shapes and meaning as :meth:`AttentionPair.backward`. Works row block by row block, so that the score matrix in
    memory is bounded; computes in float32 (float64 for float64).
    """
    dtype = accumulation_dtype(query.dtype)
    kv_heads, groups = key.shape[2], query.shape[2] // max(key.shape[2], 1)
    grouped = [t.to(dtype).transpose(1, 2).unflatten(1, (kv_heads, groups)) for t in (grad_out, query, out)]
    k, v = (t.to(dtype).transpose(1, 2).unsqueeze(2) for t in (key, value))
    row_lse = lse.to(dtype).unflatten(1, (kv_heads, groups))
    dq = torch.zeros_like(grouped[1])
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    rows = query.shape[1]
    step = max(1, _BACKWARD_SCORES // max(1, query.shape[0] * query.shape[2] * key.shape[1]))
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        g, q, o = (t[:, :, :, part] for t in grouped)
        scores, slope = scores_of(q, k, call, start)
        probabilities = torch.exp(scores - row_lse[..., part, None])
        d_scores = probabilities * (g @ v.transpose(-1, -2) - (g * o).sum(-1, keepdim=True))
        if slope is not None:
            d_scores = d_scores * slope
        dq[:, :, :, part] = (d_scores @ k) * call.scale
        dk += (d_scores.transpose(-1, -2) @ q).sum(2, keepdim=True) * call.scale
        dv += (probabilities.transpose(-1, -2) @ g).sum(2, keepdim=True)
    return (
        dq.flatten(1, 2).transpose(1, 2).to(query.dtype),
        dk.squeeze(2).transpose(1, 2).to(key.dtype),
        dv.squeeze(2).transpose(1, 2).to(value.dtype),
    )
