"""xformers' ``memory_efficient_attention``: top-left causal masking, dense biases, grouped heads in a fifth axis.

https://facebookresearch.github.io/xformers/components/ops.html. BMHK is BSHD; BMGHK groups the heads and is forward
only. A dense bias must be expanded to (B, H, Q, K) in the dtype of the query, its rows aligned to 8 elements. Which
cutlass or flash operator runs is xformers' choice.
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from .. import adapt, known_bad
from ..call import FULL_WINDOW, AttentionCall, AttentionOutput, CallSpec
from ..capabilities import Capabilities
from ..errors import Reason
from ..registry import Backend
from . import source, traced
from .source import Package
from .traced import Arguments, Extras

_DIFFERENTIABLE = "memory_efficient_attention"
_WITH_LSE = "memory_efficient_attention_forward_requires_grad"
_SOURCE = Package("xformers.ops", (_DIFFERENTIABLE, _WITH_LSE), "pip install xformers", "xformers", "0.0.29")

_CAPABILITIES = (
    Capabilities(
        devices=("cuda",),
        dtypes=(torch.float32, torch.bfloat16, torch.float16),
        min_sm=50,
        head_dim_v=True,
        masks=frozenset({"key_padding", "bool", "bias"}),
        causal="any",
        window="any",
        dropout=True,
        gqa=True,
        gradients=True,
        lse=True,
        # Its cutlass backward pass adds with atomics.
        deterministic="forward",
    ),
)


def _forward(call: AttentionCall) -> AttentionOutput:
    batch, q_len, heads, _ = call.query.shape
    key, value = call.key, call.value
    bias = None
    causal = call.is_causal and call.mask is None and call.window_size == FULL_WINDOW
    if not causal:
        mask = adapt.as_dense_mask(call)
        if mask is not None:
            bias = adapt.aligned_bias(mask, (batch, heads, q_len, key.shape[1]), call.query.dtype)
    grouped = call.enable_gqa and bias is None and not _needs_gradients(call)
    if not grouped:
        key, value = adapt.expand_kv(call)
    query, key, value = (adapt.pad_head_dim(tensor, 8) for tensor in (call.query, key, value))
    arguments = Arguments(call.scale, causal, dropout_p=call.dropout_p, return_lse=call.return_lse)
    out, lse = traced.run("xformers", query, key, value, (bias,), arguments)
    out = out[..., : call.value.shape[3]]
    empty = adapt.rows_without_key(call)
    if empty is not None:
        out = out.masked_fill(empty.transpose(1, 2)[..., None], 0.0)
        lse = None if lse is None else lse.masked_fill(empty, float("-inf"))
    return AttentionOutput(out, lse)


def _needs_gradients(call: AttentionCall) -> bool:
    tensors = (call.query, call.key, call.value)
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _body(query: Tensor, key: Tensor, value: Tensor, extras: Extras, arguments: Arguments):
    functions = source.functions(_SOURCE)
    bias = extras[0] if extras else None
    if arguments.is_causal:
        bias = importlib.import_module("xformers.ops").LowerTriangularMask()
    heads, kv_heads = query.shape[2], key.shape[2]
    grouped = heads != kv_heads
    if grouped:
        groups = (kv_heads, heads // kv_heads)
        query = query.unflatten(2, groups)
        key, value = (tensor[:, :, :, None].expand(*tensor.shape[:3], groups[1], -1) for tensor in (key, value))
    if not arguments.return_lse:
        out = functions[_DIFFERENTIABLE](
            query, key, value, attn_bias=bias, p=arguments.dropout_p, scale=arguments.scale
        )
        return (out.flatten(2, 3) if grouped else out), None
    out, lse = functions[_WITH_LSE](query, key, value, attn_bias=bias, p=0.0, scale=arguments.scale)
    if grouped:
        out, lse = out.flatten(2, 3), lse.flatten(1, 2)
    # cutlass pads the rows of its LSE.
    return out, lse[..., : query.shape[1]].float()


def _extra_reasons(spec: CallSpec) -> tuple[Reason, ...]:
    reasons = list(known_bad.reasons("xformers", spec))
    if spec.lse and spec.grad:
        what = "the function that returns the LSE has no gradient"
        reasons.append(Reason("lse", what, "call it under torch.no_grad(), or use backend='_native_efficient'."))
    if spec.lse and spec.dropout:
        what = "the function that returns the LSE takes no dropout"
        reasons.append(Reason("lse", what, "use dropout_p=0.0, or backend='_native_efficient'."))
    return tuple(reasons)


def _adapters(spec: CallSpec) -> tuple[str, ...]:
    biased = spec.mask != "none" or spec.window
    names: tuple[str, ...] = ("aligned_bias", "dense_mask") if biased else ()
    if spec.heads != spec.kv_heads and (biased or spec.grad):
        names += ("expand_kv",)
    return names + (("pad_head_dim",) if spec.head_dim % 8 or spec.head_dim_v % 8 else ())


traced.register("xformers", _body)

XFORMERS = Backend(
    name="xformers",
    family="xformers",
    capabilities=_CAPABILITIES,
    forward=_forward,
    load=lambda: source.load(_SOURCE),
    probe=lambda: source.probe(_SOURCE, _CAPABILITIES),
    extra_reasons=_extra_reasons,
    adapters=_adapters,
    external=True,
    url="https://github.com/facebookresearch/xformers",
    summary="xformers memory-efficient attention (cutlass or flash)",
)
BACKENDS = {"xformers": XFORMERS}
