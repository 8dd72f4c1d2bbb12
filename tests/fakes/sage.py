"""SageAttention 1.0.6 and 2.2: forward only, no quantisation error, all their argument traps."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor

from contracts import FunctionContract
from fakes.attention import attend, band, packed

_ACCUMULATORS = {
    "sageattn_qk_int8_pv_fp16_cuda": ("fp32", "fp16", "fp16+fp32"),
    "sageattn_qk_int8_pv_fp8_cuda": ("fp32", "fp32+fp32", "fp32+fp16"),
    "sageattn_qk_int8_pv_fp8_cuda_sm90": ("fp32+fp32",),
}


@torch.no_grad()
def sage_1(contract: FunctionContract, record: str, call: SimpleNamespace) -> Tensor:
    """SageAttention 1.0.6: no LSE, ``k -= k.mean()`` on the caller's tensor, and nothing hidden behind the last key."""
    _check(call, (torch.float16, torch.bfloat16, torch.float32))
    varlen = contract.name == "sageattn_varlen"
    dims = (64, 128) if varlen else (64, 96, 128)
    if any(tensor.shape[-1] not in dims for tensor in (call.q, call.k, call.v)):
        raise AssertionError(f"headdim should be in {dims}")
    if call.smooth_k:
        sequence = 0 if varlen else 1 if call.tensor_layout == "NHD" else 2
        call.k -= call.k.mean(dim=sequence, keepdim=True)
    return _varlen(call, _unhidden) if varlen else _dense(call, _unhidden)[0]


def _unhidden(query: Tensor, key: Tensor, value: Tensor, scale: float, allowed: Tensor | None, bias: None):
    """Attention in blocks of 64 keys filled up with zeros, which only causal masking hides.

    Causal blocks of 128 queries read the scale of a block of keys that need not exist; it is NaN here.
    """
    length = key.shape[2]
    if allowed is not None:
        out, lse = attend(query, key, value, scale=scale, allowed=allowed)
        if 0 < length % 128 <= 64:
            out[-1, -1, length // 128 * 128 :] = float("nan")
        return out, lse
    key, value = (torch.nn.functional.pad(tensor, (0, 0, 0, -length % 64)) for tensor in (key, value))
    return attend(query, key, value, scale=scale)


@torch.no_grad()
def sage_2(contract: FunctionContract, record: str, call: SimpleNamespace) -> object:
    """SageAttention 2.2.0: grouped heads together with ``return_lse`` fail inside, except where there is one group."""
    _check(call, (torch.float16, torch.bfloat16))
    if contract.name == "sageattn_varlen":
        if call.q.shape[-1] > 128:
            raise ValueError(f"Unsupported head_dim: {call.q.shape[-1]}")
        return _varlen(call)
    if call.q.shape[-1] > 128 or call.v.shape[-1] != call.q.shape[-1]:
        raise ValueError(f"Unsupported head_dim: {call.q.shape[-1]} / {call.v.shape[-1]}")
    allowed = getattr(call, "pv_accum_dtype", None)
    if allowed is not None and allowed not in _ACCUMULATORS[contract.name]:
        raise AssertionError(f"pv_accum_dtype={allowed}")
    if getattr(call, "qk_quant_gran", "per_warp") not in ("per_warp", "per_thread"):
        raise AssertionError(f"qk_quant_gran={call.qk_quant_gran}")
    if call.return_lse and getattr(call, "smooth_k", True):
        _lse_correction(call)
    out, lse = _dense(call)
    return (out, lse) if call.return_lse else out


def _lse_correction(call: SimpleNamespace) -> Tensor:
    """The product of q and the mean key as the 2.2.0 tag forms it: the head axis is taken to be axis 1."""
    sequence = 1 if call.tensor_layout == "NHD" else 2
    mean = call.k.mean(dim=sequence, keepdim=True)
    ratio = call.q.shape[2] // call.k.shape[2]
    if ratio > 1:
        mean = mean.repeat_interleave(ratio, dim=1)
    query = call.q
    if call.tensor_layout == "NHD":
        query, mean = query.transpose(1, 2), mean.transpose(1, 2)
    return query @ mean.transpose(2, 3)


def _exact(query: Tensor, key: Tensor, value: Tensor, scale: float, allowed: Tensor | None, bias: Tensor | None):
    return attend(query, key, value, scale=scale, allowed=allowed, bias=bias)


def _dense(call: SimpleNamespace, compute: Callable = _exact) -> tuple[Tensor, Tensor]:
    if call.tensor_layout not in ("NHD", "HND"):
        raise ValueError(f"tensor_layout {call.tensor_layout} not supported")
    tensors = [call.q, call.k, call.v]
    if call.tensor_layout == "NHD":
        tensors = [tensor.transpose(1, 2) for tensor in tensors]
    query, key, value = tensors
    mask = getattr(call, "attn_mask", None)
    allowed = bias = None
    if call.is_causal:
        if mask is not None:
            raise AssertionError("Mask should be None for causal attention.")
        if query.shape[2] != key.shape[2]:
            raise AssertionError("is_causal is only defined for equal lengths")
        allowed = band(query.shape[2], key.shape[2], -1, 0)
    if mask is not None:
        if mask.dtype not in (torch.bool, query.dtype):
            raise AssertionError("attn_mask must be of dtype bool or the same dtype as q.")
        mask = mask.expand(*query.shape[:3], key.shape[2])
        # The Triton kernel's scores are in units of log 2, and so is what it adds to them.
        allowed, bias = (mask, None) if mask.dtype == torch.bool else (None, mask.double() * math.log(2))
        if bias is not None and bool((bias == float("-inf")).any()):
            raise AssertionError("a tile of -inf turns into NaN")
    out, lse = compute(query, key, value, _scale(call), allowed, bias)
    return (out.transpose(1, 2) if call.tensor_layout == "NHD" else out), lse


def _varlen(call: SimpleNamespace, compute: Callable = _exact) -> Tensor:
    def one_sequence(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if call.is_causal and query.shape[2] != key.shape[2]:
            raise AssertionError("is_causal is only defined for equal lengths")
        allowed = band(query.shape[2], key.shape[2], -1, 0) if call.is_causal else None
        return compute(query, key, value, _scale(call), allowed, None)

    starts = call.cu_seqlens_q, call.cu_seqlens_k
    return packed(call.q, call.k, call.v, *starts, call.max_seqlen_q, call.max_seqlen_k, one_sequence)[0]


def _scale(call: SimpleNamespace) -> float:
    return call.q.shape[-1] ** -0.5 if call.sm_scale is None else call.sm_scale


def _check(call: SimpleNamespace, dtypes: tuple[torch.dtype, ...]) -> None:
    tensors = call.q, call.k, call.v
    if any(tensor.dtype not in dtypes or tensor.dtype != call.q.dtype for tensor in tensors):
        raise AssertionError(f"All tensors must have the same dtype, out of {dtypes}")
    if any(tensor.stride(-1) != 1 for tensor in tensors):
        raise AssertionError("Last dim of qkv must be contiguous.")
