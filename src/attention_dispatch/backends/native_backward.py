"""Gradients of torch's own kernels from an output and LSE that may belong to more keys than the call's.

A ring differentiates each block of keys with the output and LSE of the whole row: the operators only ever use
exp(score - LSE) and the row sums of grad_out * out, so a block's share of the gradient is what they return. Rows without
any key arrive with LSE +inf. All functions take ``(grad_out, call, out, lse)`` in the layout of the call, lse (B, H, Q),
and return ``(dq, dk, dv)``. Dropout is refused before a ring starts.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import adapt
from ..call import FULL_WINDOW, AttentionCall

_ops = torch.ops.aten


def mask_and_causal(call: AttentionCall) -> tuple[Tensor | None, bool]:
    """(mask, is_causal) for kernels with top-left causal masking that take either, but not both."""
    if call.mask is None and call.window_size == FULL_WINDOW:
        return None, call.is_causal
    mask = adapt.as_dense_mask(call)
    if mask is not None and mask.dtype != torch.bool:
        mask = adapt.as_additive(mask, call.query.dtype)
    return mask, False


def flash(grad_out: Tensor, call: AttentionCall, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """aten flash, CPU or CUDA."""
    if call.query.device.type == "cpu":
        return _flash_cpu(grad_out, call, out, lse)
    call, full_keys = _square(call)
    query, key, value, result, grad = _padded(call, out, grad_out)
    extras = _flash_extras(query.device)
    found = _ops._scaled_dot_product_flash_attention_backward(
        grad, query, key, value, result, lse.float().contiguous(), None, None, query.shape[2], key.shape[2],
        0.0, call.is_causal, *extras, scale=call.scale,
    )  # fmt: skip
    return _cut(found, call, full_keys)


def _flash_cpu(grad_out: Tensor, call: AttentionCall, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    mask, is_causal = mask_and_causal(call)
    key, value = adapt.expand_kv(call)
    tensors = (grad_out, call.query, key, value, out)
    dq, dk, dv = _ops._scaled_dot_product_flash_attention_for_cpu_backward(
        *(tensor.transpose(1, 2) for tensor in tensors),
        lse.to(torch.float64 if call.query.dtype == torch.float64 else torch.float32),
        0.0,
        is_causal,
        attn_mask=None if mask is None else adapt.as_additive(mask, call.query.dtype),
        scale=call.scale,
    )
    return dq.transpose(1, 2), _per_key_head(dk.transpose(1, 2), call), _per_key_head(dv.transpose(1, 2), call)


def efficient(grad_out: Tensor, call: AttentionCall, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """aten efficient: LSE rows padded to a multiple of 32, with +inf so that they add nothing; out contiguous."""
    mask, is_causal = mask_and_causal(call)
    bias = _bias(call, mask)
    expanded = _expanded(call)
    query, key, value, result, grad = _padded(expanded, out.contiguous(), grad_out)
    rows = F.pad(lse.float(), (0, -lse.shape[2] % 32), value=float("inf")).contiguous()
    seed = torch.empty((), dtype=torch.int64, device=query.device)
    found = _ops._scaled_dot_product_efficient_attention_backward(
        grad, query, key, value, bias, result, rows, seed, seed, 0.0, [True, True, True, False], is_causal,
        scale=call.scale,
    )  # fmt: skip
    dq, dk, dv = _cut(found[:3], expanded, None)
    return dq, _per_key_head(dk, call), _per_key_head(dv, call)


def cudnn(grad_out: Tensor, call: AttentionCall, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """aten cuDNN. One query and one key, for which cuDNN has no backward pass, are sent as two queries."""
    full_keys = None
    if call.is_causal and call.mask is None and call.window_size == FULL_WINDOW:
        call, full_keys = _square(call)
    rows = call.query.shape[1]
    if rows == 1 and call.key.shape[1] == 1:
        doubled = call.replaced(query=call.query.repeat(1, 2, 1, 1), is_causal=False, window_size=FULL_WINDOW)
        # The second query's gradient is 0, so it adds nothing to dk and dv.
        dq, dk, dv = cudnn(F.pad(grad_out, (0, 0, 0, 0, 0, 1)), doubled, out.repeat(1, 2, 1, 1), lse.repeat(1, 1, 2))
        return dq[:, :1], dk, dv
    mask, is_causal = mask_and_causal(call)
    bias = _bias(call, mask)
    expanded = _expanded(call)
    query, key, value, result, grad = _padded(expanded, out.contiguous(), grad_out.contiguous())
    dims, extras = _cudnn_extras(query.device)
    row_lse = lse.float().contiguous()
    found = _ops._scaled_dot_product_cudnn_attention_backward(
        grad, query, key, value, result, row_lse.unsqueeze(-1) if dims == 4 else row_lse, *extras, bias, None, None,
        query.shape[2], key.shape[2], 0.0, is_causal, scale=call.scale,
    )  # fmt: skip
    dq, dk, dv = _cut(found, expanded, full_keys)
    return dq, _per_key_head(dk, call), _per_key_head(dv, call)


def _square(call: AttentionCall) -> tuple[AttentionCall, int | None]:
    """A causal call without the keys past the last query, and how many keys there were if any were left out."""
    if not call.is_causal or call.query.shape[1] >= call.key.shape[1]:
        return call, None
    return adapt.top_left_by_slicing(call), call.key.shape[1]


def _expanded(call: AttentionCall) -> AttentionCall:
    key, value = adapt.expand_kv(call)
    return call if key is call.key else call.replaced(key=key, value=value, enable_gqa=False)


def _bias(call: AttentionCall, mask: Tensor | None) -> Tensor | None:
    if mask is None:
        return None
    batch, rows, heads, _ = call.query.shape
    return adapt.aligned_bias(mask, (batch, heads, rows, call.key.shape[1]), call.query.dtype)


def _padded(call: AttentionCall, out: Tensor, grad_out: Tensor) -> tuple[Tensor, ...]:
    """query, key, value, out and grad_out in BHSD, head dims padded to a multiple of 8."""
    tensors = (call.query, call.key, call.value, out, grad_out)
    return tuple(adapt.pad_head_dim(tensor, 8).transpose(1, 2) for tensor in tensors)


def _cut(found: tuple[Tensor, ...], call: AttentionCall, full_keys: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients in BSHD without padded columns; 0 for keys that were left out."""
    wanted = (call.query, call.key, call.value)
    dq, dk, dv = (grad.transpose(1, 2)[..., : tensor.shape[3]] for grad, tensor in zip(found, wanted))
    if full_keys is not None:
        dk, dv = (F.pad(grad, (0, 0, 0, 0, 0, full_keys - grad.shape[1])) for grad in (dk, dv))
    return dq, dk, dv


def _per_key_head(gradient: Tensor, call: AttentionCall) -> Tensor:
    """Sums over the query heads that share a key head, in float32."""
    kv_heads = call.key.shape[2]
    if gradient.shape[2] == kv_heads:
        return gradient
    return gradient.unflatten(2, (kv_heads, -1)).sum(3, dtype=torch.promote_types(gradient.dtype, torch.float32))


# The operators want the random state and shapes that their forward returned. Without dropout their values are not read,
# but their types differ between versions of torch, so they are taken from a small call.
@lru_cache(maxsize=64)
def _flash_extras(device: torch.device) -> tuple[Tensor, Tensor]:
    found = _ops._scaled_dot_product_flash_attention(*_small(device))
    return found[6], found[7]


@lru_cache(maxsize=64)
def _cudnn_extras(device: torch.device) -> tuple[int, tuple[Tensor, Tensor]]:
    """Dimensions of the LSE, and (seed, offset)."""
    found: Any = _ops._scaled_dot_product_cudnn_attention(*_small(device), None, True)
    return found[1].ndim, (found[6], found[7])


def _small(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    tensor = torch.zeros(1, 1, 64, 64, dtype=torch.float16, device=device)
    return tensor, tensor, tensor
