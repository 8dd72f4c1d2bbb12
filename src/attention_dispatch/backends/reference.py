"""The readable definition of correct: softmax(scale * q k^T + mask) v, in float64, or float32 where a device has none.

Eager and dense: it builds the full (B, H, Q, K) score matrix. Serves everything the contract knows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import adapt
from ..call import AttentionCall, AttentionOutput, CallSpec
from ..capabilities import Capabilities
from ..masks import block_table, keep_matrix
from ..registry import Backend

CAPABILITIES = Capabilities(
    devices=("cpu", "cuda", "xpu", "mps", "npu", "xla", "meta"),
    dtypes=(torch.float64, torch.float32, torch.bfloat16, torch.float16),
    head_dim_v=True,
    masks=frozenset({"key_padding", "bool", "bias", "block"}),
    causal="any",
    window="any",
    softcap=True,
    dropout=True,
    gqa=True,
    gradients=True,
    mask_gradients=True,
    lse=True,
)


def attention(call: AttentionCall, accumulate: torch.dtype | None = None) -> AttentionOutput:
    """Exact attention of a canonical call.

    Args:
        call: any call.
        accumulate: dtype of all arithmetic; float64 by default (float32 on MPS, which has no float64).
    """
    dtype = accumulate or (torch.float32 if call.query.device.type == "mps" else torch.float64)
    key, value = adapt.expand_kv(call)
    scores = torch.einsum("bqhd,bkhd->bhqk", call.query.to(dtype), key.to(dtype)) * call.scale
    if call.softcap:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    scores = _hide(scores, call)
    # The softmax of a row of -inf is nan, in the gradient too: such rows are computed from zeros and then dropped.
    empty = (scores == float("-inf")).all(dim=-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(empty, 0.0), dim=-1).masked_fill(empty, 0.0)
    if call.dropout_p:
        kept = torch.rand(weights.shape, device=weights.device) >= call.dropout_p
        weights = weights * kept / (1.0 - call.dropout_p)
    out = torch.einsum("bhqk,bkhd->bqhd", weights, value.to(dtype)).to(call.query.dtype)
    lse = torch.logsumexp(scores.detach(), dim=-1).to(torch.float32) if call.return_lse else None
    return AttentionOutput(out, lse)


def _hide(scores: Tensor, call: AttentionCall) -> Tensor:
    q_len, k_len = scores.shape[-2:]
    hidden = ~keep_matrix(q_len, k_len, call.is_causal, call.window_size, scores.device)
    scores = scores.masked_fill(hidden, float("-inf"))
    mask = call.mask
    if mask is None:
        return scores
    if mask.kind == "block":
        return scores.masked_fill(~_dense_block_mask(call), float("-inf"))
    assert mask.tensor is not None
    if mask.kind == "bias":
        return scores + mask.tensor.to(scores.dtype)
    keep = mask.tensor[:, None, None, :] if mask.kind == "key_padding" else mask.tensor
    return scores.masked_fill(~keep, float("-inf"))


def _dense_block_mask(call: AttentionCall) -> Tensor:
    """A BlockMask as bool (B or 1, H or 1, Q, K): the blocks it visits, and its mask_mod within the partial ones."""
    assert call.mask is not None and call.mask.block_mask is not None
    block_mask = call.mask.block_mask
    batch, heads = block_mask.kv_num_blocks.shape[:2]
    q_len, k_len = call.query.shape[1], call.key.shape[1]
    from torch.nn.attention.flex_attention import create_mask

    inside = create_mask(block_mask.mask_mod, batch, heads, q_len, k_len, device=call.query.device)
    table = block_table(block_mask)

    def dense(blocks: Tensor) -> Tensor:
        return blocks.repeat_interleave(table.q_block, -2).repeat_interleave(table.k_block, -1)[..., :q_len, :k_len]

    keep = inside & dense(table.partial)
    return keep if table.full is None else keep | dense(table.full)


def _adapters(spec: CallSpec) -> tuple[str, ...]:
    return ("dense_mask", "expand_kv") if spec.heads != spec.kv_heads else ("dense_mask",)


REFERENCE = Backend(
    name="reference",
    family="reference",
    capabilities=(CAPABILITIES,),
    forward=attention,
    adapters=_adapters,
    summary="eager float64 definition of correct; slow, serves everything",
)
