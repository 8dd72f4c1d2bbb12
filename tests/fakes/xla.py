"""torch_xla: BHSD, the scale defaults to 1, blocks of 512 must divide longer sequences."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor

from contracts import FunctionContract
from fakes.attention import attend, band

BLOCK = 512


def flash_attention(contract: FunctionContract, record: str, call: SimpleNamespace) -> Tensor:
    """``flash_attention``; a query whose segment has no key gets an average of all values, not 0."""
    query, key, value = call.q, call.k, call.v
    if query.shape[:2] != key.shape[:2] or key.shape != value.shape or query.shape[3] != key.shape[3]:
        raise ValueError(f"shapes {tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}")
    for length in (query.shape[2], key.shape[2]):
        if length > BLOCK and length % BLOCK:
            raise ValueError(f"a sequence of {length} is not a multiple of the block size {BLOCK}")
    if call.partition_spec is not None or call.mesh is not None:
        raise NotImplementedError("the fake is not sharded")
    allowed = torch.ones(1, 1, query.shape[2], key.shape[2], dtype=torch.bool)
    if call.causal:
        if query.shape[2] != key.shape[2]:
            raise ValueError("causal alignment of different lengths is undocumented")
        allowed = allowed & band(query.shape[2], key.shape[2], -1, 0)
    if (call.q_segment_ids is None) != (call.kv_segment_ids is None):
        raise AssertionError("Both q_segment_ids and kv_segment_ids should be provided.")
    if call.q_segment_ids is not None:
        allowed = allowed & (call.q_segment_ids[:, None, :, None] == call.kv_segment_ids[:, None, None, :])
    bias = None
    if call.ab is not None:
        if tuple(call.ab.shape) != (*query.shape[:3], key.shape[2]):
            raise ValueError(f"ab has shape {tuple(call.ab.shape)}")
        bias = call.ab
    out, _ = attend(query, key, value, scale=call.sm_scale, allowed=allowed, bias=bias)
    empty = ~allowed.expand(query.shape[0], query.shape[1], -1, -1).any(-1, keepdim=True)
    return torch.where(empty, value.mean(2, keepdim=True).to(out.dtype), out)
