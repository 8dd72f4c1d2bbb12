"""Attention kernels written in Triton. They need torch and the Triton that a CUDA build of torch brings, and nothing else.

Importing this package does not import Triton: each name below is loaded on first use.

    flash_attention            exact attention with gradients (an autograd function, and an op while tracing)
    flash_attention_forward    the forward kernel alone: (out, lse)
    flash_attention_backward   the backward kernels alone: (dq, dk, dv, dbias)
    sage_attention             INT8 QK^T with FP8 or 16-bit PV, forward only: (out, lse)

Every function takes (batch, seq, heads, head_dim) tensors, strided views included, and never copies or expands an input.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "flash_attention": "ops",
    "flash_attention_forward": "flash",
    "flash_attention_backward": "flash_backward",
    "sage_attention": "ops",
}

__all__ = ["flash_attention", "flash_attention_backward", "flash_attention_forward", "sage_attention"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
