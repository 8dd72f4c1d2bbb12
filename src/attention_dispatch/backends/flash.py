"""FlashAttention 2, 3 and 4, from their packages and from the Hugging Face Hub.

https://github.com/Dao-AILab/flash-attention. All three take BSHD, or packed (T, H, D) for their varlen functions, and
align causal masking and windows to the bottom right. They differ in what they return: version 2 pairs the output with
the LSE on request and writes +inf for a row without keys; version 3 has had three conventions; version 4 always gives
a pair whose LSE may be None, and spells an unbounded window None.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import adapt, known_bad, packing, registry
from ..call import FULL_WINDOW, AttentionCall, AttentionOutput, CallSpec
from ..capabilities import Capabilities
from ..errors import BackendRejectedError, Reason
from ..registry import Backend
from . import alignment, flash_4_masks, flash_limits, source, traced
from .source import HubKernel, Package, Source
from .traced import Arguments, Extras

_HALF = (torch.bfloat16, torch.float16)
_DENSE, _VARLEN = "flash_attn_func", "flash_attn_varlen_func"
_FUNCTIONS = (_DENSE, _VARLEN)

_PACKAGE_2 = Package(
    "flash_attn", _FUNCTIONS, "pip install 'flash-attn>=2.6.3' --no-build-isolation", "flash-attn", "2.6.3"
)
_PACKAGE_3 = Package(
    "flash_attn_interface",
    _FUNCTIONS,
    flash_limits.INSTALL_3,
)
# FlashAttention 2 wheels carry an old flash_attn/cute, which lacks learnable_sink.
_PACKAGE_4 = Package(
    "flash_attn.cute", _FUNCTIONS, "pip install --pre flash-attn-4", "flash-attn-4", parameter="learnable_sink"
)
_HUB_2 = HubKernel("kernels-community/flash-attn2", 1, _FUNCTIONS)
_HUB_3 = HubKernel("kernels-community/flash-attn3", 1, _FUNCTIONS)
_HUB_4 = HubKernel("kernels-community/flash-attn4", 0, _FUNCTIONS)


class _Variant(NamedTuple):
    name: str
    generation: int
    source: Source
    varlen: bool
    summary: str


_VARIANTS = (
    _Variant("flash", 2, _PACKAGE_2, False, "FlashAttention 2, package flash-attn"),
    _Variant("flash_hub", 2, _HUB_2, False, "FlashAttention 2 from the Hub"),
    _Variant("flash_varlen", 2, _PACKAGE_2, True, "FlashAttention 2 on packed keys: key-padding masks"),
    _Variant("flash_varlen_hub", 2, _HUB_2, True, "FlashAttention 2 from the Hub on packed keys"),
    _Variant("_flash_3", 3, _PACKAGE_3, False, "FlashAttention 3 (Hopper), package flash_attn_interface"),
    _Variant("_flash_3_hub", 3, _HUB_3, False, "FlashAttention 3 (Hopper) from the Hub"),
    _Variant("_flash_varlen_3", 3, _PACKAGE_3, True, "FlashAttention 3 on packed keys: key-padding masks"),
    _Variant("_flash_3_varlen_hub", 3, _HUB_3, True, "FlashAttention 3 from the Hub on packed keys"),
    _Variant("flash_4", 4, _PACKAGE_4, False, "FlashAttention 4 (Hopper, Blackwell), package flash-attn-4"),
    _Variant("flash_4_hub", 4, _HUB_4, False, "FlashAttention 4 (Hopper, Blackwell) from the Hub"),
)


def _capabilities(variant: _Variant) -> Capabilities:
    # Version 4 has one name for both functions: packed where a mask asks for it.
    masked = variant.varlen or variant.generation == 4
    return Capabilities(
        devices=("cuda",),
        dtypes=_HALF,
        min_sm=80,
        architectures={2: (), 3: ("sm_90",), 4: ("sm_90", "sm_100", "sm_103")}[variant.generation],
        max_head_dim=256,
        head_dim_v=variant.generation > 2,
        masks=frozenset({"key_padding"} if masked else ()) | (flash_4_masks.KINDS if _reads_masks(variant) else set()),
        # Packing moves keys, and with them the positions that causal masking and windows compare.
        mask_with_causal=False,
        causal="any",
        window="fewer_queries",
        softcap=True,
        dropout=variant.generation == 2,
        gqa=True,
        gradients=True,
        lse=True,
    )


def _reads_masks(variant: _Variant) -> bool:
    """What was compiled for a mask cannot be had from the Hub's build: its functions are of the package."""
    return variant.source is _PACKAGE_4


def _bottom_right(call: AttentionCall) -> tuple[Tensor, Tensor, bool, int, int]:
    """(key, value, causal, left, right) of a kernel aligned to the bottom right, for a top-left call with Q <= K.

    Keys that no query may see are cut off, so that the shift between the two alignments is never larger than the
    right side of the window. Views only.
    """
    left, right = call.window_size
    if call.is_causal:
        right = 0
    if left < 0 and right < 0:
        return call.key, call.value, False, -1, -1
    q_len, k_len = call.query.shape[1], call.key.shape[1]
    if right >= 0 and k_len > q_len + right:
        k_len = q_len + right
    key, value = call.key[:, :k_len], call.value[:, :k_len]
    shift = k_len - q_len
    left = left + shift if left >= 0 else -1
    if call.is_causal:
        return key, value, True, left, 0 if left >= 0 else -1
    return key, value, False, left, right - shift if right >= 0 else -1


def _arguments(call: AttentionCall, is_causal: bool, left: int, right: int) -> Arguments:
    return Arguments(
        call.scale, is_causal, left, right, call.softcap, call.dropout_p, call.deterministic, call.return_lse
    )


def _forward(variant: _Variant) -> Callable[[AttentionCall], AttentionOutput]:
    def forward(call: AttentionCall) -> AttentionOutput:
        mask = call.mask
        read = mask is not None and mask.kind in flash_4_masks.KINDS
        if variant.varlen or (mask is not None and not read):
            return _packed_forward(variant, call)
        key, value, is_causal, left, right = _bottom_right(call)
        arguments = _arguments(call, is_causal, left, right)
        query, key, value = _padded(variant, call.query, key, value)
        extras = (None, None, mask.tensor) if mask is not None else ()
        out, lse = traced.run(variant.name, query, key, value, extras, arguments)
        return AttentionOutput(out[..., : call.value.shape[3]], lse)

    return forward


def _packed_forward(variant: _Variant, call: AttentionCall) -> AttentionOutput:
    batch, q_len, _, _ = call.query.shape
    key, value, is_causal, left, right = _bottom_right(call)
    query, key, value = _padded(variant, call.query, key, value)
    arguments = _arguments(call, is_causal, left, right)._replace(longest_query=q_len, longest_key=key.shape[1])
    query, key, value, *starts, empty = packing.sequences(query, key, value, call.mask)
    out, lse = traced.run(variant.name, query, key, value, tuple(starts), arguments)
    out = out.unflatten(0, (batch, q_len))[..., : call.value.shape[3]]
    if lse is not None:
        lse = lse.unflatten(1, (batch, q_len)).transpose(0, 1)
        if empty is not None:
            lse = lse.masked_fill(empty[:, None, None], float("-inf"))
    return AttentionOutput(out, lse)


def _padded(variant: _Variant, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Version 2 pads head dims by itself."""
    return tensors if variant.generation == 2 else tuple(adapt.pad_head_dim(tensor, 8) for tensor in tensors)


def _bind(variant: _Variant) -> Callable[[AttentionCall], Callable[[Tensor, Tensor, Tensor], Tensor] | None]:
    def bind(call: AttentionCall) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
        padded = variant.generation != 2 and (call.query.shape[3] % 8 or call.value.shape[3] % 8)
        if variant.varlen or padded or call.mask is not None or call.window_size != FULL_WINDOW or call.return_lse:
            return None
        body, arguments = _bodies[variant.name], _arguments(call, call.is_causal, -1, -1)
        q_len = call.query.shape[1]
        if call.is_causal and call.key.shape[1] < q_len:
            return None
        if call.is_causal and call.key.shape[1] > q_len:
            return lambda query, key, value: body(query, key[:, :q_len], value[:, :q_len], (), arguments)[0]
        return lambda query, key, value: body(query, key, value, (), arguments)[0]

    return bind


def _split(extras: Extras, names: tuple[str, str], arguments: Arguments) -> tuple[str, dict]:
    """Which of the two functions, and its keywords for packed sequences."""
    if not extras or extras[0] is None:
        return names[0], {}
    return names[1], {
        "cu_seqlens_q": extras[0],
        "cu_seqlens_k": extras[1],
        "max_seqlen_q": arguments.longest_query,
        "max_seqlen_k": arguments.longest_key,
    }


def _body_2(variant: _Variant) -> traced.Body:
    def body(query: Tensor, key: Tensor, value: Tensor, extras: Extras, arguments: Arguments):
        name, lengths = _split(extras, _FUNCTIONS, arguments)
        result = source.functions(variant.source)[name](
            query,
            key,
            value,
            **lengths,
            dropout_p=arguments.dropout_p,
            softmax_scale=arguments.scale,
            causal=arguments.is_causal,
            window_size=(arguments.left, arguments.right),
            softcap=arguments.softcap,
            deterministic=arguments.deterministic,
            return_attn_probs=arguments.return_lse,
        )
        return (result[0], result[1].detach()) if arguments.return_lse else (result, None)

    return body


def _body_3(variant: _Variant) -> traced.Body:
    def body(query: Tensor, key: Tensor, value: Tensor, extras: Extras, arguments: Arguments):
        name, lengths = _split(extras, _FUNCTIONS, arguments)
        function = source.functions(variant.source)[name]
        asks = {"return_attn_probs": arguments.return_lse} if "return_attn_probs" in source.parameters(function) else {}
        result = function(
            query,
            key,
            value,
            **lengths,
            softmax_scale=arguments.scale,
            causal=arguments.is_causal,
            window_size=(arguments.left, arguments.right),
            softcap=arguments.softcap,
            deterministic=arguments.deterministic,
            **asks,
        )
        # Unpacking a bare tensor would split its batch axis.
        out, lse = result[:2] if isinstance(result, tuple) else (result, None)
        if not arguments.return_lse:
            return out, None
        if lse is None:
            raise BackendRejectedError(flash_limits.NO_LSE.what, (flash_limits.NO_LSE,))
        return out, lse.detach()

    return body


def _body_4(variant: _Variant) -> traced.Body:
    def body(query: Tensor, key: Tensor, value: Tensor, extras: Extras, arguments: Arguments):
        name, lengths = _split(extras, _FUNCTIONS, arguments)
        left, right = (None if bound < 0 else bound for bound in (arguments.left, arguments.right))
        mask = extras[2] if len(extras) > 2 else None
        masked = {} if mask is None else flash_4_masks.keywords(mask, query, key)
        out, lse = source.functions(variant.source)[name](
            query,
            key,
            value,
            **lengths,
            softmax_scale=arguments.scale,
            causal=arguments.is_causal,
            window_size=(left, right),
            softcap=arguments.softcap,
            deterministic=arguments.deterministic,
            return_lse=arguments.return_lse,
            **masked,
        )
        return out, lse.detach() if arguments.return_lse else None

    return body


def _extra_reasons(variant: _Variant) -> Callable[[CallSpec], tuple[Reason, ...]]:
    def reasons(spec: CallSpec) -> tuple[Reason, ...]:
        if variant.generation == 2:
            limits = flash_limits.of_version_2(spec)
        elif variant.generation == 3:
            limits = (*flash_limits.of_version_3(spec), *_limits_of_build(variant, spec))
        else:
            limits = (*flash_limits.of_version_4(spec), *flash_4_masks.limits(spec))
        return (*limits, *known_bad.reasons(variant.name, spec))

    return reasons


def _limits_of_build(variant: _Variant, spec: CallSpec) -> tuple[Reason, ...]:
    left_out = flash_limits.left_out(spec, variant.varlen) if variant.source is _PACKAGE_3 else ()
    if not spec.lse or not registry.status(variant.name).available:
        return left_out
    lacks_lse = flash_limits.lacks_lse(source.functions(variant.source)[_DENSE])
    return (*left_out, flash_limits.NO_LSE) if lacks_lse else left_out


def _adapters(variant: _Variant) -> Callable[[CallSpec], tuple[str, ...]]:
    def adapters(spec: CallSpec) -> tuple[str, ...]:
        pad = variant.generation != 2 and (spec.head_dim % 8 or spec.head_dim_v % 8)
        names: tuple[str, ...] = ("pad_head_dim",) if pad else ()
        names += ("pack_keys",) if spec.mask == "key_padding" else ()
        return names + ((alignment.SPLIT,) if alignment.splits(spec) else ())

    return adapters


def _backend(variant: _Variant) -> Backend:
    capabilities = (_capabilities(variant),)
    body = {2: _body_2, 3: _body_3, 4: _body_4}[variant.generation](variant)
    traced.register(variant.name, body)
    _bodies[variant.name] = body
    return Backend(
        name=variant.name,
        family="flash",
        capabilities=capabilities,
        forward=alignment.any_lengths(_forward(variant)),
        load=lambda: source.load(variant.source),
        probe=lambda: source.probe(variant.source, capabilities),
        extra_reasons=_extra_reasons(variant),
        adapters=_adapters(variant),
        bind=_bind(variant),
        external=True,
        url="https://github.com/Dao-AILab/flash-attention",
        summary=variant.summary,
    )


_bodies: dict[str, traced.Body] = {}
BACKENDS = {variant.name: _backend(variant) for variant in _VARIANTS}

FLASH = BACKENDS["flash"]
FLASH_HUB = BACKENDS["flash_hub"]
FLASH_VARLEN = BACKENDS["flash_varlen"]
FLASH_VARLEN_HUB = BACKENDS["flash_varlen_hub"]
FLASH_3 = BACKENDS["_flash_3"]
FLASH_3_HUB = BACKENDS["_flash_3_hub"]
FLASH_VARLEN_3 = BACKENDS["_flash_varlen_3"]
FLASH_3_VARLEN_HUB = BACKENDS["_flash_3_varlen_hub"]
FLASH_4 = BACKENDS["flash_4"]
FLASH_4_HUB = BACKENDS["flash_4_hub"]
