"""The kernels as torch operators: gradients, and one opaque node each under torch.compile.

Eager calls without gradients go straight to the Python functions (an operator made with Library.define costs about 2.6 µs more
per call, one made with torch.library.custom_op about 16). While tracing, calls go through the operators defined here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .flash import dropout_seed_tensor, flash_attention_forward
from .flash_backward import flash_attention_backward
from .sage import sage_attention_forward

_library = torch.library.Library("attention_dispatch_kernels", "DEF")

_SCORES = "float scale, bool is_causal, int window_left, int window_right, float softcap"
_MASKS = "Tensor? key_padding, Tensor? mask, Tensor? bias"
_library.define(
    f"flash_forward(Tensor query, Tensor key, Tensor value, {_SCORES}, {_MASKS}, float dropout_p, Tensor? dropout_seed)"
    " -> (Tensor, Tensor)"
)
_library.define(
    "flash_backward(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse,"
    f" {_SCORES}, {_MASKS}, float dropout_p, Tensor? dropout_seed, bool bias_requires_grad)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    f"sage_forward(Tensor query, Tensor key, Tensor value, {_SCORES}, {_MASKS}, str? pv, bool smooth_v) -> (Tensor, Tensor)"
)


def _flash_forward(
    query: Tensor, key: Tensor, value: Tensor, scale: float, is_causal: bool, window_left: int, window_right: int,
    softcap: float, key_padding: Tensor | None, mask: Tensor | None, bias: Tensor | None,
    dropout_p: float, dropout_seed: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out, lse = flash_attention_forward(
        query, key, value, scale=scale, is_causal=is_causal, window_size=(window_left, window_right), softcap=softcap,
        key_padding=key_padding, mask=mask, bias=bias, dropout_p=dropout_p, dropout_seed=dropout_seed, return_lse=True,
    )  # fmt: skip
    assert lse is not None
    return out, lse


def _flash_backward(
    grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    scale: float, is_causal: bool, window_left: int, window_right: int, softcap: float,
    key_padding: Tensor | None, mask: Tensor | None, bias: Tensor | None, dropout_p: float, dropout_seed: Tensor | None,
    bias_requires_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv, dbias = flash_attention_backward(
        grad_out, query, key, value, out, lse, scale=scale, is_causal=is_causal, window_size=(window_left, window_right),
        softcap=softcap, key_padding=key_padding, mask=mask, bias=bias, dropout_p=dropout_p, dropout_seed=dropout_seed,
        grad_lse=grad_lse, bias_requires_grad=bias_requires_grad,
    )  # fmt: skip
    return dq, dk, dv, dbias if dbias is not None else query.new_empty(0)


def _sage_forward(
    query: Tensor, key: Tensor, value: Tensor, scale: float, is_causal: bool, window_left: int, window_right: int,
    softcap: float, key_padding: Tensor | None, mask: Tensor | None, bias: Tensor | None, pv: str | None, smooth_v: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out, lse = sage_attention_forward(
        query, key, value, scale=scale, is_causal=is_causal, window_size=(window_left, window_right), softcap=softcap,
        key_padding=key_padding, mask=mask, bias=bias, pv=pv, smooth_v=smooth_v, return_lse=True,
    )  # fmt: skip
    assert lse is not None
    return out, lse


def _like_forward(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    batch, seq_q, heads, _ = query.shape
    lse = query.new_empty((batch, heads, seq_q), dtype=torch.float32)
    return query.new_empty((batch, seq_q, heads, value.shape[3])), lse


def _like_backward(
    grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    bias, bias_requires_grad = rest[7], rest[10]
    made = [x.new_empty(x.shape) for x in (query, key, value)]
    dbias = bias.new_empty(bias.shape) if bias is not None and bias_requires_grad else query.new_empty(0)
    return made[0], made[1], made[2], dbias


for _name, _run, _like in (
    ("flash_forward", _flash_forward, _like_forward),
    ("flash_backward", _flash_backward, _like_backward),
    ("sage_forward", _sage_forward, _like_forward),
):
    # CPU serves the interpreter (TRITON_INTERPRET=1); without it Triton itself says that it has no driver.
    _library.impl(_name, _run, "CUDA")
    _library.impl(_name, _run, "CPU")
    torch.library.register_fake(f"attention_dispatch_kernels::{_name}", _like, lib=_library)

_ops = torch.ops.attention_dispatch_kernels


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, *scores, key_padding, mask, bias, dropout_p, seed = inputs
    ctx.save_for_backward(query, key, value, *output, key_padding, mask, bias, seed)
    ctx.scores, ctx.dropout_p = scores, dropout_p


def _traced_backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    query, key, value, out, lse, key_padding, mask, bias, seed = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    wants_bias = bias is not None and ctx.needs_input_grad[10]
    dq, dk, dv, dbias = _ops.flash_backward(
        grad_out,
        grad_lse,
        query,
        key,
        value,
        out,
        lse,
        *ctx.scores,
        key_padding,
        mask,
        bias,
        ctx.dropout_p,
        seed,
        wants_bias,
    )
    return dq, dk, dv, None, None, None, None, None, None, None, dbias if wants_bias else None, None, None


torch.library.register_autograd(
    "attention_dispatch_kernels::flash_forward", _traced_backward, setup_context=_save_for_backward, lib=_library
)


class _FlashAttention(torch.autograd.Function):
    """The same gradient for eager calls, without the operators' dispatch."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        output = _flash_forward(*inputs)
        _save_for_backward(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse, key_padding, mask, bias, seed = ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        wants_bias = bias is not None and ctx.needs_input_grad[10]
        scale, is_causal, window_left, window_right, softcap = ctx.scores
        dq, dk, dv, dbias = _flash_backward(
            grad_out, grad_lse, query, key, value, out, lse, scale, is_causal, window_left, window_right, softcap,
            key_padding, mask, bias, ctx.dropout_p, seed, wants_bias,
        )  # fmt: skip
        return dq, dk, dv, None, None, None, None, None, None, None, dbias if wants_bias else None, None, None


def flash_attention(
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
    dropout_p: float = 0.0,
    dropout_seed: Tensor | int | None = None,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """flash_attention_forward with gradients for query, key, value and bias (and through the returned lse).

    Works under torch.compile(fullgraph=True), CUDA-graph capture (after one call to compile the kernels) and
    inference_mode. Bitwise repeatable, backward included.
    """
    tracing = torch.compiler.is_compiling()
    tensors = (query, key, value) if bias is None else (query, key, value, bias)
    if not tracing and not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors)):
        return flash_attention_forward(
            query, key, value, scale=scale, is_causal=is_causal, window_size=window_size, softcap=softcap,
            key_padding=key_padding, mask=mask, bias=bias, dropout_p=dropout_p, dropout_seed=dropout_seed,
            return_lse=return_lse,
        )  # fmt: skip
    seed = dropout_seed_tensor(dropout_p, dropout_seed, query.device)
    run = _ops.flash_forward if tracing else _FlashAttention.apply
    out, lse = run(
        query, key, value, scale, is_causal, *window_size, softcap, key_padding, mask, bias, dropout_p, seed
    )  # fmt: skip
    return out, lse if return_lse else None


def sage_attention(
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
    pv: str | None = None,
    smooth_v: bool = False,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """sage_attention_forward, as one opaque operator while tracing; no gradient.

    Raises RuntimeError if gradients are enabled and an input requires them.
    """
    if torch.compiler.is_compiling():
        out, lse = _ops.sage_forward(
            query, key, value, scale, is_causal, *window_size, softcap, key_padding, mask, bias, pv, smooth_v
        )
        return out, lse if return_lse else None
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        raise RuntimeError("sage_attention has no gradient: call it under torch.no_grad(), or use flash_attention")
    return sage_attention_forward(
        query, key, value, scale=scale, is_causal=is_causal, window_size=window_size, softcap=softcap,
        key_padding=key_padding, mask=mask, bias=bias, pv=pv, smooth_v=smooth_v, return_lse=return_lse,
    )  # fmt: skip
