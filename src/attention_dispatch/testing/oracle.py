"""Attention from its definition, in any dtype: in float64 it is the truth, in a low one it is torch's own error.

Written against the arguments of a call, not their canonical form, and independent of every backend.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .cases import Case, Inputs


class Exact(NamedTuple):
    """Attention and its derivatives.

    Attributes:
        out: (B, Q, H, V). lse: (B, H, Q), natural log; -inf where a query sees no key.
        grads: of query, key, value and, if asked for, the additive mask; empty without gradients.
    """

    out: Tensor
    lse: Tensor
    grads: tuple[Tensor, ...] = ()


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    keep: Tensor | None = None,
    bias: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """(out, lse) in the dtype of ``query``, by the definition of the contract.

    Args:
        query: (B, Q, H, D). key: (B, K, G, D). value: (B, K, G, V), with H a multiple of G.
        keep: bool, broadcastable to (B, H, Q, K). bias: floating, likewise.
        window_size: (left, right); query i sees keys i - left <= j <= i + right; -1 is unbounded.
    """
    q_len, heads, head_dim = query.shape[1:]
    k_len = key.shape[1]
    # Head h of query reads key head h // (H / G).
    owner = torch.arange(heads, device=query.device) // (heads // key.shape[2])
    queries, keys, values = (
        tensor.permute(0, 2, 1, 3) for tensor in (query, key.index_select(2, owner), value.index_select(2, owner))
    )
    scores = (queries @ keys.mT) * (head_dim**-0.5 if scale is None else scale)
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    distance = torch.arange(k_len, device=query.device)[None, :] - torch.arange(q_len, device=query.device)[:, None]
    visible = torch.ones_like(scores, dtype=torch.bool)
    if is_causal:
        visible = visible & (distance <= 0)
    left, right = window_size
    if left != -1:
        visible = visible & (distance >= -left)
    if right != -1:
        visible = visible & (distance <= right)
    if keep is not None:
        visible = visible & keep
    visible = visible & (scores.detach() != float("-inf"))
    # Hidden scores never enter the arithmetic, so that neither values nor gradients can become NaN.
    lowest = torch.finfo(scores.dtype).min
    largest = torch.where(visible, scores.detach(), lowest).amax(dim=-1, keepdim=True)
    terms = torch.where(visible, torch.exp(torch.where(visible, scores - largest, 0.0)), 0.0)
    total = terms.sum(dim=-1, keepdim=True)
    nothing = ~visible.any(dim=-1, keepdim=True)
    weights = terms / torch.where(nothing, 1.0, total)
    lse = torch.where(nothing, float("-inf"), largest + torch.log(torch.where(nothing, 1.0, total)))
    return (weights @ values).permute(0, 2, 1, 3), lse.squeeze(-1)


def exact_attention(case: Case, inputs: Inputs, dtype: torch.dtype = torch.float64) -> Exact:
    """The result of a case without dropout, computed in ``dtype`` throughout."""
    # Autocast rounds the operands before the kernel sees them; that rounding is part of the call.
    leaves = [
        tensor.detach().to(case.compute_dtype).to(dtype).requires_grad_(case.grad)
        for tensor in (inputs.query, inputs.key, inputs.value)
    ]
    bias = inputs.mask.bias
    if bias is not None:
        bias = bias.detach().to(dtype).requires_grad_(case.mask_grad)
    out, lse = attend(
        *leaves,
        keep=inputs.mask.keep,
        bias=bias,
        is_causal=case.is_causal,
        scale=case.scale,
        window_size=case.window_size,
        softcap=case.softcap,
    )
    wanted = differentiated(case, (*leaves, bias))
    grads = torch.autograd.grad(out, wanted, output_gradient(case, out)) if wanted else ()
    return Exact(out.detach(), lse.detach(), grads)


def eight_bit_attention(case: Case, inputs: Inputs) -> Exact:
    """Exact attention of q and k rounded to INT8, with one scale per head, the coarsest that vendors use.

    The mean of k over the tokens is taken off first, as they do; it changes no weight.
    """
    query, key = inputs.query.detach().double(), inputs.key.detach().double()
    mean = key.mean(1, keepdim=True)
    return exact_attention(case, inputs._replace(query=_to_int8(query), key=_to_int8(key - mean) + mean))


def _to_int8(tensor: Tensor) -> Tensor:
    step = (tensor.abs().amax((1, 3), keepdim=True) / 127).clamp_min(1e-30)
    return (tensor / step).round() * step


def differentiated(case: Case, tensors: tuple[Tensor | None, ...]) -> list[Tensor]:
    """Of (query, key, value, bias) those whose gradients a case asks for."""
    query, key, value, bias = tensors
    wanted = [query, key, value] if case.grad else []
    if case.mask_grad:
        wanted.append(bias)
    return [tensor for tensor in wanted if tensor is not None]


def output_gradient(case: Case, out: Tensor) -> Tensor:
    """What is differentiated: a fixed random gradient of the output, the same in every dtype up to rounding."""
    generator = torch.Generator().manual_seed(11)
    return torch.randn(out.shape, generator=generator).to(case.compute_dtype).to(out.device, out.dtype)
