"""Single-process float64 attention, and kernels of different ability as pairs of tensor functions."""

from __future__ import annotations

import torch
from torch import Tensor

from attention_dispatch.distributed import BlockCall, BlockFacts, exact_backward
from attention_dispatch.errors import Reason


def attention(query, key, value, mask=None, *, is_causal=False, window=(-1, -1), scale=None, softcap=0.0):
    """Exact attention in the dtype of its inputs, layout (B, S, H, D), and its LSE (B, H, Sq)."""
    groups = query.shape[2] // key.shape[2]
    key, value = key.repeat_interleave(groups, 2), value.repeat_interleave(groups, 2)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    i = torch.arange(query.shape[1])[:, None]
    j = torch.arange(key.shape[1])[None, :]
    seen = torch.ones(query.shape[1], key.shape[1], dtype=torch.bool)
    if is_causal:
        seen &= j <= i
    if window[0] >= 0:
        seen &= j >= i - window[0]
    if window[1] >= 0:
        seen &= j <= i + window[1]
    scores = scores.masked_fill(~seen.to(scores.device), -torch.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.to(scores.dtype)
    lse = torch.logsumexp(scores, -1)
    empty = lse == -torch.inf
    weights = torch.exp(scores - lse.masked_fill(empty, 0.0)[..., None])
    return torch.einsum("bhqk,bkhd->bqhd", weights, value), lse


class TorchPair:
    """A kernel that serves what it is told to, exactly.

    Args:
        masks: mask kinds served besides "none".
        causal: "none", "equal" (square only) or "any".
        window: whether a window is served.
        differentiable: whether autograd may differentiate the forward.
        gradients: whether there is a backward.
    """

    def __init__(self, name="torch", masks=("key_padding", "bool", "bias"), causal="any", window=True,
                 differentiable=False, gradients=True, lse=True):
        self.name, self.differentiable = name, differentiable
        self._masks, self._causal, self._window, self._gradients, self._lse = masks, causal, window, gradients, lse
        self.calls: list[tuple[tuple[int, int], BlockCall]] = []

    def reasons_against(self, query, key, value, facts: BlockFacts):
        reasons = []
        if facts.mask_kind != "none" and facts.mask_kind not in self._masks:
            reasons.append(Reason("mask", f"a {facts.mask_kind} mask is not supported", "use another backend"))
        if facts.is_causal and (self._causal == "none" or (self._causal == "equal" and facts.lengths != "equal")):
            reasons.append(Reason("causal", "causal is not supported", "use another backend"))
        if facts.has_window and not self._window:
            reasons.append(Reason("window", "a window is not supported", "use another backend"))
        if facts.needs_grad and not self._gradients:
            reasons.append(Reason("gradients", "it is forward-only", "call it under torch.no_grad()"))
        if facts.needs_lse and not self._lse:
            reasons.append(Reason("lse", "it yields no LSE", "use another backend"))
        return reasons

    def forward(self, query, key, value, call: BlockCall):
        self.calls.append(((query.shape[1], key.shape[1]), call))
        assert call.mask_kind == "none" or call.mask_kind in self._masks
        assert not call.is_causal or self._causal == "any" or query.shape[1] == key.shape[1]
        assert call.window_size == (-1, -1) or self._window
        mask = call.mask[:, None, None] if call.mask_kind == "key_padding" else call.mask
        out, lse = attention(query, key, value, mask, is_causal=call.is_causal, window=call.window_size,
                             scale=call.scale, softcap=call.softcap)
        return out, lse.detach()

    def backward(self, grad_out: Tensor, query, key, value, out, lse, call: BlockCall):
        assert self._gradients
        return exact_backward(grad_out, query, key, value, out, lse, call)
