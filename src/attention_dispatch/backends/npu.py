"""Ascend NPU: ``torch_npu.npu_fusion_attention`` in its BSND layout, which is BSHD.

https://www.hiascend.com/document (npu_fusion_attention). Its mask hides where it is True, its scale defaults to 1, it
adds ``pse`` before scaling, and gives the LSE as a maximum and a sum. Causal masking is ``sparse_mode=2`` (top-left)
with a compressed 2048 x 2048 triangle, for any lengths. Written from the documentation and tested on fakes: nobody has
run this file on an NPU.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .. import adapt, known_bad
from ..call import FULL_WINDOW, AttentionCall, AttentionOutput, CallSpec
from ..capabilities import Capabilities
from ..errors import Reason
from ..masks import keep_matrix
from ..registry import Backend
from . import source
from .source import Package

_FUNCTION = "npu_fusion_attention"
_SOURCE = Package("torch_npu", (_FUNCTION,), "pip install torch-npu", "torch-npu")
_COMPRESSED = 2048
_LEFT_UP_CAUSAL = 2
_DENSE = 0
_MAX_HEAD_DIM = 768

_CAPABILITIES = (
    Capabilities(
        devices=("npu",),
        dtypes=(torch.float32, torch.bfloat16, torch.float16),
        max_head_dim=_MAX_HEAD_DIM,
        masks=frozenset({"key_padding", "bool", "bias"}),
        causal="any",
        window="any",
        dropout=True,
        gqa=True,
        gradients=True,
        lse=True,
        deterministic="forward",
    ),
)


def _forward(call: AttentionCall) -> AttentionOutput:
    if call.scale == 0.0 and call.mask is not None:
        # A bias cannot be divided by a scale of zero.
        call = call.replaced(query=call.query * 0.0, scale=1.0)
    hidden, bias, sparse_mode = _masks(call)
    out, maximum, total, *_ = source.functions(_SOURCE)[_FUNCTION](
        call.query,
        call.key,
        call.value,
        call.query.shape[2],
        "BSND",
        pse=bias,
        atten_mask=hidden,
        scale=call.scale,
        keep_prob=1.0 - call.dropout_p,
        sparse_mode=sparse_mode,
    )
    lse = (maximum[..., 0] + torch.log(total[..., 0])).detach() if call.return_lse else None
    empty = adapt.rows_without_key(call)
    if empty is not None:
        out = out.masked_fill(empty.transpose(1, 2)[..., None], 0.0)
        lse = None if lse is None else lse.masked_fill(empty, float("-inf"))
    return AttentionOutput(out, lse)


def _masks(call: AttentionCall) -> tuple[Tensor | None, Tensor | None, int]:
    """(hidden, bias, sparse_mode): what ``atten_mask`` and ``pse`` are for a call; True hides."""
    batch, q_len, heads, _ = call.query.shape
    k_len, device = call.key.shape[1], call.query.device
    if call.mask is None and call.window_size == FULL_WINDOW:
        return (_triangle(device), None, _LEFT_UP_CAUSAL) if call.is_causal else (None, None, _DENSE)
    if call.mask is None or call.mask.kind != "bias":
        kept = adapt.as_dense_mask(call)
        assert kept is not None
        return _shaped(~kept, batch, q_len, k_len), None, _DENSE
    bias = call.mask.tensor
    assert bias is not None
    hidden = torch.isneginf(bias)
    if call.is_causal or call.window_size != FULL_WINDOW:
        hidden = hidden | ~keep_matrix(q_len, k_len, call.is_causal, call.window_size, device)
    # The kernel scales q @ k + pse; an infinite pse is not documented, so those keys are hidden instead.
    bias = (bias.masked_fill(torch.isneginf(bias), 0.0) / call.scale).to(call.query.dtype)
    return _shaped(hidden, batch, q_len, k_len), bias.expand(batch, heads, q_len, k_len), _DENSE


def _shaped(hidden: Tensor, batch: int, q_len: int, k_len: int) -> Tensor:
    """Expanded to one of the documented shapes: (B, N, S, S), (B, 1, S, S) or (1, 1, S, S)."""
    per_head = hidden.shape[1] > 1
    return hidden.expand(batch if per_head else hidden.shape[0], -1, q_len, k_len)


@functools.lru_cache(maxsize=8)
def _triangle(device: torch.device) -> Tensor:
    return torch.ones(_COMPRESSED, _COMPRESSED, dtype=torch.bool, device=device).triu(1)


def _extra_reasons(spec: CallSpec) -> tuple[Reason, ...]:
    return known_bad.reasons("_native_npu", spec)


def _adapters(spec: CallSpec) -> tuple[str, ...]:
    return ("dense_mask",) if spec.mask != "none" or spec.window else ()


NPU = Backend(
    name="_native_npu",
    family="npu",
    capabilities=_CAPABILITIES,
    forward=_forward,
    load=lambda: source.load(_SOURCE),
    probe=lambda: source.probe(_SOURCE, _CAPABILITIES),
    extra_reasons=_extra_reasons,
    adapters=_adapters,
    external=True,
    url="https://gitee.com/ascend/pytorch",
    summary="Ascend NPU fusion attention, package torch_npu (not run on an NPU)",
)
BACKENDS = {"_native_npu": NPU}
