"""This project's Triton kernels: exact attention with gradients, and quantised attention, forward only.

They need the Triton that a CUDA build of torch brings and nothing else; under ``TRITON_INTERPRET=1`` they run on the CPU,
slowly, for tests. See ``attention_dispatch.kernels``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..call import AttentionCall, AttentionOutput
from ..capabilities import Capabilities, Tolerance
from ..errors import InvalidCallError, Reason
from ..registry import Backend
from ..tuning import store
from . import source
from .source import Package

_HALF = (torch.bfloat16, torch.float16)
_MASKS = frozenset({"key_padding", "bool", "bias"})
# Triton 3.6 is the version these kernels were checked with.
_TRITON = Package("triton", (), "pip install 'triton>=3.6'", "triton", "3.6")
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Relative error on an H100, 2026-11-25, keys with an offset of 2 sigma: 3.7e-2 to 4.0e-2 with FP8 values, 1.1e-2 to 1.2e-2
# with 16-bit values; twice that, as short sequences average less away.
_FP8_VALUES = Tolerance(relative_l2=0.08, cosine=0.996)
_INTERPRETED_FP8 = Tolerance(relative_l2=0.15, cosine=0.985)
_FP16_VALUES = Tolerance(relative_l2=0.03, cosine=0.999)


def _capabilities(dtypes: tuple[torch.dtype, ...], **facts: Any) -> tuple[Capabilities, ...]:
    shared: dict[str, Any] = {
        "max_head_dim": 256,
        "head_dim_v": True,
        "masks": _MASKS,
        "causal": "any",
        "window": "any",
        "softcap": True,
        "gqa": True,
        "lse": True,
        **facts,
    }
    rows: tuple[Capabilities, ...] = (Capabilities(devices=("cuda",), dtypes=dtypes, min_sm=80, **shared),)
    if _INTERPRETED:
        # The interpreter computes with numpy, which has no bfloat16.
        on_cpu = tuple(dtype for dtype in dtypes if dtype != torch.bfloat16)
        # It also cuts off what a GPU rounds to FP8.
        tolerance = {"tolerance": _INTERPRETED_FP8} if shared.get("tolerance") is _FP8_VALUES else {}
        rows += (Capabilities(devices=("cpu",), dtypes=on_cpu, **(shared | tolerance)),)
    return rows


_EXACT = _capabilities((torch.float32, *_HALF), dropout=True, gradients=True, mask_gradients=True)
_SAGE = _capabilities(_HALF, options=("smooth_v",), quantised=True, tolerance=_FP8_VALUES)
_SAGE_FP16 = _capabilities(_HALF, quantised=True, tolerance=_FP16_VALUES)


def _load() -> None:
    # Imports Triton.
    from ..kernels import ops  # noqa: F401

    _follow_store()
    if _follow_store not in store.on_change:
        store.on_change.append(_follow_store)


def _follow_store() -> None:
    from ..tuning.tiles import follow_store

    follow_store("cuda" if torch.cuda.is_available() else "cpu")


def _probe(rows: tuple[Capabilities, ...]) -> Callable[[], tuple[Reason, ...]]:
    return _TRITON.probe if _INTERPRETED else lambda: source.probe(_TRITON, rows)


def _arguments(call: AttentionCall) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "scale": call.scale,
        "is_causal": call.is_causal,
        "window_size": call.window_size,
        "softcap": call.softcap,
    }
    if call.mask is not None:
        names = {"key_padding": "key_padding", "bool": "mask", "bias": "bias"}
        arguments[names[call.mask.kind]] = call.mask.tensor
    return arguments


def _flash(call: AttentionCall) -> AttentionOutput:
    from ..kernels import flash_attention

    out, lse = flash_attention(
        call.query,
        call.key,
        call.value,
        **_arguments(call),
        dropout_p=call.dropout_p,
        return_lse=call.return_lse,
    )
    return AttentionOutput(out, None if lse is None else lse.detach())


def _flash_backward(grad_out: Tensor, call: AttentionCall, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients from a global ``out`` and ``lse``, such as those of a ring."""
    from ..kernels import flash_attention_backward

    dq, dk, dv, _ = flash_attention_backward(grad_out, call.query, call.key, call.value, out, lse, **_arguments(call))
    return dq, dk, dv


def _sage(pv: str | None) -> Callable[[AttentionCall], AttentionOutput]:
    def forward(call: AttentionCall) -> AttentionOutput:
        from ..kernels import sage_attention

        smooth_v = call.options.get("smooth_v", False)
        if not isinstance(smooth_v, bool):
            raise InvalidCallError(f"smooth_v is True or False, got {smooth_v!r}.")
        return AttentionOutput(
            *sage_attention(
                call.query,
                call.key,
                call.value,
                **_arguments(call),
                pv=pv,
                smooth_v=smooth_v,
                return_lse=call.return_lse,
            )
        )

    return forward


FLASH = Backend(
    name="triton_flash",
    family="triton",
    capabilities=_EXACT,
    forward=_flash,
    load=_load,
    probe=_probe(_EXACT),
    external=True,
    backward=_flash_backward,
    url="https://arxiv.org/abs/2307.08691",
    summary="this project's exact Triton kernel",
)
SAGE = Backend(
    name="triton_sage",
    family="triton",
    capabilities=_SAGE,
    forward=_sage(None),
    load=_load,
    probe=_probe(_SAGE),
    external=True,
    url="https://arxiv.org/abs/2411.10958",
    summary="this project's INT8 kernel; FP8 values on sm_89 and newer, 16-bit before",
)
SAGE_FP16 = Backend(
    name="triton_sage_fp16",
    family="triton",
    capabilities=_SAGE_FP16,
    forward=_sage("fp16"),
    load=_load,
    probe=_probe(_SAGE_FP16),
    external=True,
    url="https://arxiv.org/abs/2411.10958",
    summary="this project's INT8 kernel with 16-bit values",
)
