"""The float64 answer that kernels are compared with, and the calls they are compared on."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor


def exact_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    is_causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    key_padding: Tensor | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, lse) in float64; `kept` is what dropout multiplies the probabilities by."""
    query, key, value = (x.double().transpose(1, 2) for x in (query, key, value))
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = query @ key.transpose(-1, -2) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.double()
    i = torch.arange(scores.shape[2], device=scores.device)[:, None]
    j = torch.arange(scores.shape[3], device=scores.device)[None]
    left, right = window_size
    visible = torch.ones_like(scores, dtype=torch.bool)
    if is_causal:
        visible &= j <= i
    if left >= 0:
        visible &= j >= i - left
    if right >= 0:
        visible &= j <= i + right
    if key_padding is not None:
        visible &= key_padding[:, None, None]
    if mask is not None:
        visible &= mask
    scores = scores.masked_fill(~visible, -math.inf)
    lse = torch.logsumexp(scores, -1)
    probabilities = torch.exp(scores - torch.where(lse == -math.inf, 0.0, lse)[..., None])
    if kept is not None:
        probabilities = probabilities * kept
    return (probabilities @ value).transpose(1, 2), lse


class Case(NamedTuple):
    name: str
    batch: int
    seq_q: int
    seq_k: int
    heads: int
    heads_kv: int
    head_dim: int
    head_dim_v: int
    options: tuple[str, ...] = ()

    def inputs(self, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
        query = torch.randn(self.batch, self.seq_q, self.heads, self.head_dim, device=device)
        key = torch.randn(self.batch, self.seq_k, self.heads_kv, self.head_dim, device=device)
        value = torch.randn(self.batch, self.seq_k, self.heads_kv, self.head_dim_v, device=device)
        return query.to(dtype), key.to(dtype), value.to(dtype)

    def arguments(self, device: str) -> dict[str, Any]:
        made: dict[str, Any] = {"scale": self.head_dim**-0.5}
        shape = (self.batch, self.heads, self.seq_q, self.seq_k)
        for option in self.options:
            if option == "causal":
                made["is_causal"] = True
            elif option == "window":
                made["window_size"] = (20, 5)
            elif option == "left":
                made["window_size"] = (3, -1)
            elif option == "softcap":
                made["softcap"] = 1.5
            elif option == "negative":
                made["scale"] = -0.3
            elif option == "scattered":
                made["key_padding"] = torch.rand(self.batch, self.seq_k, device=device) > 0.5
                made["key_padding"][-1] = False
            elif option == "left_padding":
                made["key_padding"] = (torch.arange(self.seq_k, device=device) >= self.seq_k * 2 // 3)[None]
            elif option == "right_padding":
                made["key_padding"] = (torch.arange(self.seq_k, device=device) < self.seq_k * 2 // 3)[None]
            elif option == "mask":
                made["mask"] = torch.rand(shape[0], 1, *shape[2:], device=device) > 0.9
            elif option == "bias":
                made["bias"] = torch.randn(1, *shape[1:], device=device)
            elif option == "key_bias":
                made["bias"] = torch.randn(1, shape[1], 1, shape[3], device=device)
            elif option == "query_bias":
                made["bias"] = torch.randn(shape[0], 1, shape[2], 1, device=device)
            else:
                raise ValueError(option)
        return made


CASES = [
    Case("ragged", 2, 70, 70, 2, 2, 40, 48),
    Case("full tiles", 1, 128, 256, 2, 2, 64, 64),
    Case("head_dim 128", 1, 64, 256, 1, 1, 128, 128),
    Case("head_dim 192", 1, 33, 65, 1, 1, 192, 192),
    Case("one query", 2, 1, 130, 2, 2, 64, 64),
    Case("one key", 1, 40, 1, 1, 1, 16, 16),
    Case("gqa", 1, 50, 70, 4, 2, 16, 24),
    Case("causal, more queries", 1, 200, 37, 2, 1, 64, 64, ("causal",)),
    Case("causal, more keys", 1, 37, 300, 2, 1, 64, 64, ("causal",)),
    Case("window", 1, 250, 130, 2, 1, 16, 16, ("window",)),
    Case("left window", 1, 150, 290, 1, 1, 16, 16, ("left",)),
    Case("causal window", 1, 150, 150, 1, 1, 16, 16, ("left", "causal")),
    Case("softcap", 1, 37, 100, 2, 1, 72, 72, ("softcap",)),
    Case("negative scale", 1, 37, 33, 2, 1, 24, 24, ("negative",)),
    Case("scattered padding", 2, 37, 300, 2, 1, 16, 16, ("scattered",)),
    Case("left padding", 2, 37, 300, 2, 1, 16, 16, ("left_padding",)),
    Case("right padding, causal", 2, 170, 300, 2, 1, 16, 16, ("right_padding", "causal")),
    Case("left padding, causal", 1, 170, 200, 2, 1, 16, 16, ("left_padding", "causal")),
    Case("mask", 2, 37, 100, 2, 1, 16, 16, ("mask",)),
    Case("bias", 2, 37, 100, 2, 1, 16, 16, ("bias",)),
    Case("key bias, causal", 2, 37, 100, 2, 1, 16, 16, ("key_bias", "causal")),
    Case("query bias, softcap, mask", 2, 37, 100, 2, 1, 16, 16, ("query_bias", "softcap", "mask")),
]


def relative_error(got: Tensor, want: Tensor) -> float:
    """Frobenius norm of the difference over that of the answer; inf for anything that is not finite."""
    if not bool(got.isfinite().all()):
        return math.inf
    return float((got.detach().double() - want.double()).norm() / want.double().norm().clamp_min(1e-30))


def same_lse(got: Tensor, want: Tensor, tolerance: float) -> bool:
    """Equal within `tolerance` (absolute), and -inf in the same places."""
    empty = want == -math.inf
    if not torch.equal(got == -math.inf, empty):
        return False
    return bool(((got.double() - want).masked_fill(empty, 0.0).abs() <= tolerance).all())
