"""torch_npu: True means masked, the scale defaults to 1, the LSE comes in two halves."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor

from contracts import FunctionContract
from fakes.attention import attend, band

COMPRESSED = 2048
LANES = 8


def npu_fusion_attention(contract: FunctionContract, record: str, call: SimpleNamespace) -> tuple:
    """``npu_fusion_attention`` for the BSND layout, sparse modes 0 (dense mask) and 2 (top-left causal)."""
    if call.input_layout != "BSND":
        raise NotImplementedError(f"the fake has no layout {call.input_layout}")
    tensors = call.query, call.key, call.value
    if any(tensor.dtype != call.query.dtype for tensor in tensors):
        raise RuntimeError("query, key and value must share a dtype")
    if call.key.shape != call.value.shape:
        raise RuntimeError("key and value must have the same shape")
    query, key, value = (tensor.transpose(1, 2) for tensor in tensors)
    if call.head_num != query.shape[1]:
        raise RuntimeError(f"head_num={call.head_num}, the query has {query.shape[1]} heads")
    # The kernel forms scale * (pse + q @ k), so the bias is scaled too.
    bias = None if call.pse is None else _pse(call.pse, query, key) * call.scale
    out, lse = attend(
        query,
        key,
        value,
        scale=call.scale,
        allowed=_allowed(call, query, key),
        bias=bias,
        dropout_p=1.0 - call.keep_prob,
    )
    # Two halves whose combination max + log(sum) is the LSE; the split itself is arbitrary.
    maximum = torch.where(lse.isinf(), torch.zeros_like(lse), lse - 1.0)
    total = torch.exp(lse - maximum)
    halves = [half.detach()[..., None].expand(*half.shape, LANES).contiguous() for half in (maximum, total)]
    return (out.transpose(1, 2), *halves, query.new_empty(0), 0, 0, 0)


def _allowed(call: SimpleNamespace, query: Tensor, key: Tensor) -> Tensor | None:
    mask = call.atten_mask
    if mask is None:
        if call.sparse_mode:
            raise RuntimeError("sparse_mode needs atten_mask")
        return None
    if mask.dtype not in (torch.bool, torch.uint8):
        raise RuntimeError(f"atten_mask is {mask.dtype}")
    if call.sparse_mode == 2:
        if not torch.equal(mask.bool(), torch.ones(COMPRESSED, COMPRESSED, dtype=torch.bool).triu(1)):
            raise RuntimeError("sparse_mode=2 takes the compressed upper triangle")
        return band(query.shape[2], key.shape[2], -1, 0)
    if call.sparse_mode:
        raise NotImplementedError(f"the fake has no sparse_mode {call.sparse_mode}")
    lengths = (query.shape[2], key.shape[2])
    shapes = {
        (query.shape[0], query.shape[1], *lengths),
        (query.shape[0], 1, *lengths),
        (1, 1, *lengths),
        lengths,
    }
    if tuple(mask.shape) not in shapes:
        raise RuntimeError(f"atten_mask has shape {tuple(mask.shape)}, supported: {shapes}")
    return ~mask.bool()


def _pse(pse: Tensor, query: Tensor, key: Tensor) -> Tensor:
    batch, heads, length = query.shape[:3]
    shapes = {(batch, heads, length, key.shape[2]), (batch, heads, 1, key.shape[2]), (1, heads, length, key.shape[2])}
    if pse.dtype != query.dtype or tuple(pse.shape) not in shapes:
        raise RuntimeError(f"pse is {tuple(pse.shape)} {pse.dtype}, supported: {shapes} {query.dtype}")
    return pse.double()
