"""How far outputs and gradients lie from exact attention, on sampled rows: cheap enough for the sizes of real calls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..call import AttentionCall, CallSpec
from ..capabilities import row_for
from ..registry import Backend

_ROWS = 64
_HEADS = 2
# An exact kernel's own error is about a quarter of the dtype's step, of its gradients up to 0.7 (torch's CPU kernels in
# bfloat16 and float16, lengths 1 to 4096, torch 2.13, 2026-11-25); TF32 products set the floor for float32.
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


class GradientSample(NamedTuple):
    """Exact gradients of a call for an output gradient that is zero but on some rows, so that few rows count.

    Attributes:
        grad_out: what to start the backward pass with; like the output, in the dtype of the call.
        exact: float64 by name: ``query`` (rows, heads, D) and ``key``, ``value`` (heads, K, D or V) of ``batch``, of
            those that need gradients; ``mask`` whole.
        cancelled: by name, the norm of what softmax's derivative subtracts; rounding errors are in proportion to it,
            also where, as with a single key, nothing is left.
        batch, rows, heads, kv_heads: where.
    """

    grad_out: Tensor
    exact: dict[str, Tensor]
    cancelled: dict[str, float]
    batch: int
    rows: Tensor
    heads: Tensor
    kv_heads: Tensor


class _Part(NamedTuple):
    """Sampled rows and heads of the last sample of a batch, which is the one that padding and offsets reach.

    ``query`` (heads, rows, D), ``key`` and ``value`` (kv heads, K, D or V), float64; ``owner`` is the index of each
    head's kv head among ``kv_heads``; ``mask`` is the whole tensor, or None.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    batch: int
    rows: Tensor
    heads: Tensor
    kv_heads: Tensor
    owner: Tensor


def sample(call: AttentionCall) -> Sample | None:
    """Some rows of the exact result, in float64; None for calls that have none here (dropout, BlockMask, no keys)."""
    part = _part(call)
    if part is None:
        return None
    with torch.no_grad():
        return Sample(_attend(call, part)[0], part.batch, part.rows, part.heads)


def sample_gradients(call: AttentionCall) -> GradientSample | None:
    """Exact gradients on the rows of :func:`sample`; None where that is."""
    part = _part(call)
    if part is None:
        return None
    tensors = {"query": call.query, "key": call.key, "value": call.value}
    leaves = {name: getattr(part, name).requires_grad_() for name in tensors if tensors[name].requires_grad}
    mask = None if call.mask is None else call.mask.tensor
    if mask is not None and mask.requires_grad:
        leaves["mask"] = mask.detach().double().requires_grad_()
        part = part._replace(mask=leaves["mask"])
    query = call.query
    grad_out = torch.zeros((*query.shape[:3], call.value.shape[3]), dtype=query.dtype, device=query.device)
    generator = torch.Generator(query.device).manual_seed(0)
    size = (len(part.rows), len(part.heads), call.value.shape[3])
    sampled = torch.randn(size, generator=generator, dtype=query.dtype, device=query.device)
    grad_out[part.batch, part.rows[:, None], part.heads[None]] = sampled
    with torch.enable_grad():
        out, weights, scores = _attend(call, part)
        found = torch.autograd.grad(out, list(leaves.values()), sampled.double(), retain_graph=True)
        delta = (out.detach() * sampled.double()).sum(dim=-1).T[..., None]
        subtracted = (
            torch.autograd.grad(scores, list(leaves.values()), weights.detach() * delta, allow_unused=True)
            if scores.requires_grad
            else [None] * len(leaves)
        )
    exact = dict(zip(leaves, found))
    if "query" in exact:
        exact["query"] = exact["query"].transpose(0, 1)
    cancelled = {name: 0.0 if term is None else float(term.norm()) for name, term in zip(leaves, subtracted)}
    return GradientSample(grad_out, exact, cancelled, part.batch, part.rows, part.heads, part.kv_heads)


def _part(call: AttentionCall) -> _Part | None:
    if call.dropout_p or (call.mask is not None and call.mask.tensor is None) or call.key.shape[1] == 0:
        return None
    query, device = call.query, call.query.device
    q_len, heads = query.shape[1], query.shape[2]
    batch = query.shape[0] - 1
    rows = torch.linspace(0, q_len - 1, min(_ROWS, q_len), device=device).round().long()
    chosen = torch.linspace(0, heads - 1, min(_HEADS, heads), device=device).round().long()
    kv_heads, owner = (chosen // (heads // call.key.shape[2])).unique(return_inverse=True)
    with torch.no_grad():
        return _Part(
            query[batch].index_select(0, rows).index_select(1, chosen).transpose(0, 1).double(),
            call.key[batch].index_select(1, kv_heads).transpose(0, 1).double(),
            call.value[batch].index_select(1, kv_heads).transpose(0, 1).double(),
            None if call.mask is None or call.mask.tensor is None else call.mask.tensor.detach(),
            batch,
            rows,
            chosen,
            kv_heads,
            owner,
        )


def _attend(call: AttentionCall, part: _Part) -> tuple[Tensor, Tensor, Tensor]:
    """Exact output (rows, heads, V) of a part, and the weights and scores (heads, rows, K) behind it."""
    scores = part.query @ part.key[part.owner].mT * call.scale
    if call.softcap:
        scores = torch.tanh(scores / call.softcap) * call.softcap
    scores = _hide(call, scores, part)
    empty = (scores == float("-inf")).all(dim=-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(empty, 0.0), dim=-1).masked_fill(empty, 0.0)
    return (weights @ part.value[part.owner]).transpose(0, 1), weights, scores


def _hide(call: AttentionCall, scores: Tensor, part: _Part) -> Tensor:
    """``scores`` (heads, rows, K) with masks, causal masking and window applied."""
    rows = part.rows
    distance = torch.arange(scores.shape[-1], device=rows.device)[None] - rows[:, None]
    left, right = call.window_size
    right = min(right, 0) if call.is_causal and right >= 0 else (0 if call.is_causal else right)
    keep = torch.ones_like(distance, dtype=torch.bool)
    if left >= 0:
        keep &= distance >= -left
    if right >= 0:
        keep &= distance <= right
    if call.mask is not None and part.mask is not None:
        tensor = part.mask
        if call.mask.kind == "key_padding":
            tensor = tensor[:, None, None, :]
        tensor = tensor[part.batch if tensor.shape[0] > 1 else 0]
        tensor = tensor.index_select(0, part.heads) if tensor.shape[0] > 1 else tensor
        tensor = tensor.index_select(1, rows) if tensor.shape[1] > 1 else tensor
        if tensor.dtype == torch.bool:
            keep = keep & tensor
        else:
            scores = scores + tensor.double()
    return scores.masked_fill(~keep, float("-inf"))


def error_of(out: Tensor, exact: Sample) -> Error:
    """The :class:`Error` of an output (B, Q, H, V) on the sampled rows."""
    with torch.no_grad():
        return _error(out[exact.batch].index_select(0, exact.rows).index_select(1, exact.heads), exact.out)


def gradient_errors(gradients: Mapping[str, Tensor], exact: GradientSample) -> dict[str, Error]:
    """The :class:`Error` of each gradient by name, of a backward pass that began with ``exact.grad_out``; relative to
    the exact one plus what was cancelled in it.

    Args:
        gradients: ``query`` (B, Q, H, D), ``key``, ``value`` and ``mask`` as the call's own; those that are needed.
    """
    found = {}
    with torch.no_grad():
        for name, expected in exact.exact.items():
            whole = gradients[name]
            if name == "mask":
                part = whole
            elif name == "query":
                part = whole[exact.batch].index_select(0, exact.rows).index_select(1, exact.heads)
            else:
                part = whole[exact.batch].index_select(1, exact.kv_heads).transpose(0, 1)
            error = _error(part, expected, exact.cancelled[name])
            found[name] = error if bool(whole.isfinite().all()) else Error(float("nan"), float("nan"))
    return found


def _error(actual: Tensor, expected: Tensor, cancelled: float = 0.0) -> Error:
    actual = actual.double()
    if not bool(actual.isfinite().all()):
        return Error(float("nan"), float("nan"))
    difference = actual - expected
    size = float(expected.norm()) + cancelled
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


def gradient_problem(backend: Backend, spec: CallSpec, errors: Mapping[str, Error]) -> str | None:
    """What is wrong with the errors of gradients, in words; None if they are allowed."""
    bound = allowed(backend, spec)
    for name, error in errors.items():
        if error.relative_l2 != error.relative_l2:
            return f"its gradient of {name} is not finite"
        if error.relative_l2 > bound:
            return f"the relative error of its gradient of {name} is {error.relative_l2:.3g}, allowed {bound:.3g}"
    return None
