"""How far an output lies from exact attention, on sampled rows: cheap enough for the sizes of real calls."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..call import AttentionCall, CallSpec
from ..capabilities import row_for
from ..registry import Backend

_ROWS = 64
_HEADS = 2
# An exact kernel's own error is about a quarter of the dtype's step; TF32 products set the floor for float32.
_STEPS = 2.0
_FLOAT32_ERROR = 2e-3
_FLOAT64_ERROR = 1e-9


class Error(NamedTuple):
    """Difference from exact attention on the sampled rows.

    Attributes:
        relative_l2: ||out - exact|| / ||exact||. largest: largest absolute difference; both NaN where a value is not
            finite.
    """

    relative_l2: float
    largest: float


class Sample(NamedTuple):
    """Exact rows of a call: ``out`` float64 (rows, heads, V) of batch ``batch``, at ``rows`` and ``heads``."""

    out: Tensor
    batch: int
    rows: Tensor
    heads: Tensor


def sample(call: AttentionCall) -> Sample | None:
    """Some rows of the exact result, in float64; None for calls that have none here (dropout, BlockMask, no keys)."""
    if call.dropout_p or (call.mask is not None and call.mask.tensor is None) or call.key.shape[1] == 0:
        return None
    query, device = call.query, call.query.device
    q_len, k_len, heads = query.shape[1], call.key.shape[1], query.shape[2]
    # The last sample of a batch is the one that padding and offsets reach.
    batch = query.shape[0] - 1
    rows = torch.linspace(0, q_len - 1, min(_ROWS, q_len), device=device).round().long()
    chosen = torch.linspace(0, heads - 1, min(_HEADS, heads), device=device).round().long()
    owner = chosen // (heads // call.key.shape[2])
    with torch.no_grad():
        queries = query[batch].index_select(0, rows).index_select(1, chosen).transpose(0, 1).double()
        keys = call.key[batch].index_select(1, owner).transpose(0, 1).double()
        values = call.value[batch].index_select(1, owner).transpose(0, 1).double()
        scores = queries @ keys.mT * call.scale
        if call.softcap:
            scores = torch.tanh(scores / call.softcap) * call.softcap
        scores = _hide(call, scores, batch, rows, chosen, k_len)
        empty = (scores == float("-inf")).all(dim=-1, keepdim=True)
        weights = torch.softmax(scores.masked_fill(empty, 0.0), dim=-1).masked_fill(empty, 0.0)
        return Sample((weights @ values).transpose(0, 1), batch, rows, chosen)


def _hide(call: AttentionCall, scores: Tensor, batch: int, rows: Tensor, heads: Tensor, k_len: int) -> Tensor:
    """``scores`` (heads, rows, K) with masks, causal masking and window applied."""
    distance = torch.arange(k_len, device=rows.device)[None] - rows[:, None]
    left, right = call.window_size
    right = min(right, 0) if call.is_causal and right >= 0 else (0 if call.is_causal else right)
    keep = torch.ones_like(distance, dtype=torch.bool)
    if left >= 0:
        keep &= distance >= -left
    if right >= 0:
        keep &= distance <= right
    if call.mask is not None and call.mask.tensor is not None:
        tensor = call.mask.tensor.detach()
        if call.mask.kind == "key_padding":
            tensor = tensor[:, None, None, :]
        tensor = tensor[batch if tensor.shape[0] > 1 else 0]
        tensor = tensor.index_select(0, heads) if tensor.shape[0] > 1 else tensor
        tensor = tensor.index_select(1, rows) if tensor.shape[1] > 1 else tensor
        if tensor.dtype == torch.bool:
            keep = keep & tensor
        else:
            scores = scores + tensor.double()
    return scores.masked_fill(~keep, float("-inf"))


def error_of(out: Tensor, exact: Sample) -> Error:
    """The :class:`Error` of an output (B, Q, H, V) on the sampled rows."""
    with torch.no_grad():
        actual = out[exact.batch].index_select(0, exact.rows).index_select(1, exact.heads).double()
        if not bool(actual.isfinite().all()):
            return Error(float("nan"), float("nan"))
        difference = actual - exact.out
        size = float(exact.out.norm())
        return Error(float(difference.norm()) / max(size, 1e-30), float(difference.abs().max()))


def allowed(backend: Backend, spec: CallSpec) -> float:
    """Largest relative L2 error: declared for 8-bit backends, else that of rounding in the dtype of the call."""
    row = row_for(backend.capabilities, spec.device)
    declared = 0.0 if row is None else row.tolerance.relative_l2
    if declared:
        return declared
    if spec.dtype == torch.float64:
        return _FLOAT64_ERROR
    return _FLOAT32_ERROR if spec.dtype == torch.float32 else _STEPS * torch.finfo(spec.dtype).eps


def problem(backend: Backend, spec: CallSpec, error: Error) -> str | None:
    """What is wrong with an error, in words; None if it is allowed."""
    if error.relative_l2 != error.relative_l2:
        return "its output is not finite"
    bound = allowed(backend, spec)
    return None if error.relative_l2 <= bound else f"its relative error is {error.relative_l2:.3g}, allowed {bound:.3g}"
