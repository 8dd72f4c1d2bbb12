"""xformers: BMHK or BMGHK, structured biases by class, dense biases with their alignment rule."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor

from contracts import FunctionContract
from fakes.attention import attend, band


class AttentionBias:
    """Base class of the structured biases."""


class LowerTriangularMask(AttentionBias):
    """Causal, top-left aligned."""


def memory_efficient_attention(contract: FunctionContract, record: str, call: SimpleNamespace) -> object:
    """All three entry points; only ``memory_efficient_attention`` has gradients."""
    if contract.name == "memory_efficient_attention":
        return _run(call)[0]
    if call.p:
        raise NotImplementedError("dropout is not supported on the non-autograd API.")
    with torch.no_grad():
        out, lse = _run(call)
    default = torch.float32 if contract.name == "memory_efficient_attention_partial" else out.dtype
    return out.to(call.output_dtype or default), lse


def _run(call: SimpleNamespace) -> tuple[Tensor, Tensor]:
    tensors = call.query, call.key, call.value
    if any(tensor.dtype != call.query.dtype or tensor.dim() != call.query.dim() for tensor in tensors):
        raise ValueError("query, key and value must share dtype and rank")
    if call.query.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise NotImplementedError(f"dtype={call.query.dtype}")
    grouped = call.query.dim() == 5
    if grouped:
        if any(tensor.requires_grad for tensor in tensors) and torch.is_grad_enabled():
            raise NotImplementedError("grouped heads have no backward")
        if call.query.shape[2:4] != call.key.shape[2:4] or call.key.shape[:4] != call.value.shape[:4]:
            raise ValueError("expand key and value to the heads of the query")
        tensors = tuple(tensor.flatten(2, 3) for tensor in tensors)
    query, key, value = (tensor.transpose(1, 2) for tensor in tensors)
    if query.shape[1] != key.shape[1]:
        raise ValueError(f"{query.shape[1]} query heads and {key.shape[1]} key heads")
    allowed = bias = None
    if isinstance(call.attn_bias, LowerTriangularMask):
        allowed = band(query.shape[2], key.shape[2], -1, 0)
    elif isinstance(call.attn_bias, Tensor):
        bias = _dense_bias(call.attn_bias, query, key, grouped)
    elif call.attn_bias is not None:
        raise NotImplementedError(f"the fake has no {type(call.attn_bias).__name__}")
    scale = query.shape[-1] ** -0.5 if call.scale is None else call.scale
    out, lse = attend(query, key, value, scale=scale, allowed=allowed, bias=bias, dropout_p=call.p)
    out = out.transpose(1, 2)
    if grouped:
        shape = call.query.shape
        return out.unflatten(2, shape[2:4]), lse.unflatten(1, shape[2:4])
    return out, lse


def _dense_bias(bias: Tensor, query: Tensor, key: Tensor, grouped: bool) -> Tensor:
    expected = (*query.shape[:3], key.shape[2])
    if grouped:
        raise NotImplementedError("the fake has no dense bias over grouped heads")
    if tuple(bias.shape) != expected or bias.dtype != query.dtype:
        raise ValueError(f"attn_bias is {tuple(bias.shape)} {bias.dtype}, expected {expected} {query.dtype}")
    if bias.stride(-1) != 1 or any(stride % 8 for stride in bias.stride()[:-1]):
        raise ValueError(f"attn_bias must be aligned to 8 elements, strides are {bias.stride()}")
    return bias
