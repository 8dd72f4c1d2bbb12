"""TPU: ``torch_xla``'s Pallas FlashAttention, BHSD.

https://pytorch.org/xla/master/features/pallas.html. Its scale defaults to 1, it knows neither grouped heads nor
dropout nor the LSE, and sequences longer than a block of 512 must be multiples of it. Tested on fakes: nobody has run
this file on a TPU.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import adapt, known_bad
from ..call import FULL_WINDOW, AttentionCall, AttentionOutput, CallSpec
from ..capabilities import Capabilities
from ..errors import Reason
from ..registry import Backend
from . import source
from .source import Package

_FUNCTION = "flash_attention"
_SOURCE = Package(
    "torch_xla.experimental.custom_kernel",
    (_FUNCTION,),
    "pip install 'torch_xla[tpu,pallas]' -f https://storage.googleapis.com/libtpu-releases/index.html",
    "torch-xla",
    "2.2",
)
_BLOCK = 512

_CAPABILITIES = (
    Capabilities(
        devices=("xla",),
        dtypes=(torch.float32, torch.bfloat16),
        masks=frozenset({"key_padding", "bool", "bias"}),
        causal="equal",
        window="equal",
        gqa=True,
        gradients=True,
        deterministic="forward",
    ),
)


def _forward(call: AttentionCall) -> AttentionOutput:
    key, value = adapt.expand_kv(call)
    q_len, k_len = call.query.shape[1], key.shape[1]
    q_pad, k_pad = (-length % _BLOCK if length > _BLOCK else 0 for length in (q_len, k_len))
    query, key, value = (
        F.pad(tensor, (0, 0, 0, 0, 0, pad)).transpose(1, 2)
        for tensor, pad in ((call.query, q_pad), (key, k_pad), (value, k_pad))
    )
    query_segments, key_segments = _segments(call, q_pad, k_pad)
    out = source.functions(_SOURCE)[_FUNCTION](
        query,
        key,
        value,
        causal=call.is_causal and _only_causal(call),
        q_segment_ids=query_segments,
        kv_segment_ids=key_segments,
        sm_scale=call.scale,
        ab=_bias(call, q_pad, k_pad),
    )
    out = out.transpose(1, 2)[:, :q_len]
    empty = adapt.rows_without_key(call)
    if empty is not None:
        out = out.masked_fill(empty.transpose(1, 2)[..., None], 0.0)
    return AttentionOutput(out)


def _only_causal(call: AttentionCall) -> bool:
    """Whether causal masking stands alone, or beside key padding, and is left to the kernel."""
    return call.window_size == FULL_WINDOW and (call.mask is None or call.mask.kind == "key_padding")


def _segments(call: AttentionCall, q_pad: int, k_pad: int) -> tuple[Tensor | None, Tensor | None]:
    """Segment ids (B, S), 1 for what counts: a query sees keys of its own segment only. None if all count."""
    padding = (
        call.mask.tensor if call.mask is not None and call.mask.kind == "key_padding" and _only_causal(call) else None
    )
    if padding is None and not k_pad:
        return None, None
    batch, q_len = call.query.shape[:2]
    k_len, device = call.key.shape[1], call.query.device
    queries = torch.ones(batch, q_len + q_pad, dtype=torch.int32, device=device)
    kept = torch.ones(1, k_len, dtype=torch.int32, device=device) if padding is None else padding.to(torch.int32)
    return queries, F.pad(kept, (0, k_pad)).expand(batch, -1).contiguous()


def _bias(call: AttentionCall, q_pad: int, k_pad: int) -> Tensor | None:
    """Everything the kernel does not do by itself, as an additive (B, H, Q, K) bias of finite numbers."""
    if _only_causal(call):
        return None
    mask = adapt.as_dense_mask(call)
    if mask is None:
        return None
    dtype = call.query.dtype
    # The kernel's own value for hidden scores: a row of -inf would become NaN.
    lowest = 0.7 * torch.finfo(dtype).min
    bias = adapt.as_additive(mask, dtype).clamp(min=lowest)
    batch, q_len, heads, _ = call.query.shape
    return F.pad(bias.expand(batch, heads, q_len, call.key.shape[1]), (0, k_pad, 0, q_pad))


def _extra_reasons(spec: CallSpec) -> tuple[Reason, ...]:
    return known_bad.reasons("_native_xla", spec)


def _adapters(spec: CallSpec) -> tuple[str, ...]:
    dense = spec.window or spec.mask in ("bool", "bias")
    return (("dense_mask",) if dense else ()) + (("expand_kv",) if spec.heads != spec.kv_heads else ())


XLA = Backend(
    name="_native_xla",
    family="xla",
    capabilities=_CAPABILITIES,
    forward=_forward,
    load=lambda: source.load(_SOURCE),
    probe=lambda: source.probe(_SOURCE, _CAPABILITIES),
    extra_reasons=_extra_reasons,
    adapters=_adapters,
    external=True,
    url="https://github.com/pytorch/xla",
    summary="Pallas FlashAttention on TPU, package torch_xla (not run on a TPU)",
)
BACKENDS = {"_native_xla": XLA}
