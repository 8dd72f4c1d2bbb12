"""AMD: aiter's composable-kernel FlashAttention from the Hub, bf16 and forward only.

https://huggingface.co/kernels-community/aiter-flash-attn-ck. BSHD, bottom-right alignment, and a window whose third
number counts sink tokens. Its ``**kwargs`` are dropped. Tested on fakes: nobody has run this file on an AMD GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import adapt, known_bad
from ..call import AttentionCall, AttentionOutput, CallSpec
from ..capabilities import Capabilities
from ..errors import Reason
from ..registry import Backend
from . import alignment, source, traced
from .source import HubKernel
from .traced import Arguments, Extras

_FUNCTION = "flash_attn_func"
_SOURCE = HubKernel("kernels-community/aiter-flash-attn-ck", 1, (_FUNCTION,))

_CAPABILITIES = (
    Capabilities(
        devices=("cuda",),
        dtypes=(torch.bfloat16,),
        architectures=("gfx942", "gfx950"),
        # Built for head dims 64 and 128; smaller ones are padded.
        max_head_dim=128,
        head_dim_v=True,
        causal="any",
        dropout=True,
        gqa=True,
        lse=True,
    ),
)


def _forward(call: AttentionCall) -> AttentionOutput:
    if call.is_causal:
        call = adapt.top_left_by_slicing(call)
    arguments = Arguments(call.scale, call.is_causal, dropout_p=call.dropout_p, return_lse=call.return_lse)
    return AttentionOutput(*traced.run("aiter_fa2_hub", call.query, call.key, call.value, (), arguments))


def _body(query: Tensor, key: Tensor, value: Tensor, extras: Extras, arguments: Arguments):
    result = source.functions(_SOURCE)[_FUNCTION](
        query,
        key,
        value,
        dropout_p=arguments.dropout_p,
        softmax_scale=arguments.scale,
        causal=arguments.is_causal,
        return_lse=arguments.return_lse,
    )
    return (result[0], result[1].float()) if arguments.return_lse else (result, None)


def _extra_reasons(spec: CallSpec) -> tuple[Reason, ...]:
    return known_bad.reasons("aiter_fa2_hub", spec)


traced.register("aiter_fa2_hub", _body)

AITER = Backend(
    name="aiter_fa2_hub",
    family="aiter",
    capabilities=_CAPABILITIES,
    forward=alignment.any_lengths(_forward),
    load=lambda: source.load(_SOURCE),
    probe=lambda: source.probe(_SOURCE, _CAPABILITIES),
    extra_reasons=_extra_reasons,
    adapters=lambda spec: (alignment.SPLIT,) if alignment.splits(spec) else (),
    external=True,
    url="https://huggingface.co/kernels-community/aiter-flash-attn-ck",
    summary="aiter FlashAttention on AMD Instinct from the Hub, forward only (not run on an AMD GPU)",
)
BACKENDS = {"aiter_fa2_hub": AITER}
