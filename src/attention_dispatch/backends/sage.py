"""SageAttention 1.0.6 and 2: INT8 products of q and k, forward only.

https://github.com/thu-ml/SageAttention. ``NHD`` is BSHD. Version 1 (Triton, see ``sage_1``) centres the caller's keys
in place and has no LSE; version 2 drops what its ``**kwargs`` swallow, and takes a mask in its Triton variant only.
Neither has a backward pass: an output computed under autograd would come back detached.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import adapt, known_bad, packing
from ..call import AttentionCall, AttentionOutput, CallSpec
from ..capabilities import Capabilities, Tolerance
from ..errors import InvalidCallError, Reason
from ..masks import derived
from ..registry import Backend
from . import alignment, sage_1, source, traced
from .source import HubKernel, Package, Source
from .traced import Arguments, Extras

_HALF = (torch.bfloat16, torch.float16)
_LOG2_E = math.log2(math.e)
# Relative error of INT8 products with fp16 / fp8 values on H100, 2026-11-23: 1.1e-2 to 1.3e-2 / 3.8e-2; twice that.
_FP16_VALUES = Tolerance(relative_l2=0.03, cosine=0.999)
_FP8_VALUES = Tolerance(relative_l2=0.08, cosine=0.996)

_GIT = "pip install git+https://github.com/thu-ml/SageAttention --no-build-isolation"
_ANY_VERSION = "pip install sageattention"

_NEW_ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_120", "sm_121")
_HUB_ARCHITECTURES = ("sm_80", "sm_89", "sm_90", "sm_120")


def _package(function: str, minimum: str, install: str) -> Package:
    return Package("sageattention", (function,), install, "sageattention", minimum)


class _Variant(NamedTuple):
    name: str
    function: str
    source: Source
    tolerance: Tolerance
    summary: str
    architectures: tuple[str, ...] = ()
    masks: frozenset[str] = frozenset()
    options: tuple[str, ...] = ()


_CUDA_OPTIONS = ("qk_quant_gran", "pv_accum_dtype", "smooth_k")
_VARIANTS = (
    _Variant(
        "sage",
        "sageattn",
        _package("sageattn", "1.0.6", _ANY_VERSION),
        _FP8_VALUES,
        "SageAttention 1.0.6 or 2, its own choice of kernel",
        options=("smooth_k",),
    ),
    _Variant(
        "sage_hub",
        "sageattn",
        HubKernel("kernels-community/sage-attention", 1, ("sageattn",)),
        _FP8_VALUES,
        "SageAttention 2 from the Hub",
        _HUB_ARCHITECTURES,
    ),
    _Variant(
        "sage_varlen",
        "sageattn_varlen",
        _package("sageattn_varlen", "1.0.6", _ANY_VERSION),
        _FP16_VALUES,
        "SageAttention on packed keys: key-padding masks",
        masks=frozenset({"key_padding"}),
        options=("smooth_k",),
    ),
    _Variant(
        "_sage_qk_int8_pv_fp8_cuda",
        "sageattn_qk_int8_pv_fp8_cuda",
        _package("sageattn_qk_int8_pv_fp8_cuda", "2.1", _GIT),
        _FP8_VALUES,
        "SageAttention 2, fp8 values (made for sm_89 and sm_120)",
        ("sm_89", "sm_90", "sm_120", "sm_121"),
        options=(*_CUDA_OPTIONS, "smooth_v"),
    ),
    _Variant(
        "_sage_qk_int8_pv_fp8_cuda_sm90",
        "sageattn_qk_int8_pv_fp8_cuda_sm90",
        _package("sageattn_qk_int8_pv_fp8_cuda_sm90", "2.1", _GIT),
        _FP8_VALUES,
        "SageAttention 2, fp8 values, Hopper kernel",
        ("sm_90",),
        options=_CUDA_OPTIONS,
    ),
    _Variant(
        "_sage_qk_int8_pv_fp16_cuda",
        "sageattn_qk_int8_pv_fp16_cuda",
        _package("sageattn_qk_int8_pv_fp16_cuda", "2.1", _GIT),
        _FP16_VALUES,
        "SageAttention 2, fp16 values, CUDA kernel",
        _NEW_ARCHITECTURES,
        options=(*_CUDA_OPTIONS, "smooth_v"),
    ),
    _Variant(
        "_sage_qk_int8_pv_fp16_triton",
        "sageattn_qk_int8_pv_fp16_triton",
        _package("sageattn_qk_int8_pv_fp16_triton", "2.1", _GIT),
        _FP16_VALUES,
        "SageAttention 2, fp16 values, Triton kernel; takes masks",
        masks=frozenset({"key_padding", "bool", "bias"}),
        options=("smooth_k",),
    ),
)
_ACCUMULATORS = {
    "sageattn_qk_int8_pv_fp16_cuda": ("fp32", "fp16", "fp16+fp32"),
    "sageattn_qk_int8_pv_fp8_cuda": ("fp32", "fp32+fp32", "fp32+fp16"),
    "sageattn_qk_int8_pv_fp8_cuda_sm90": ("fp32+fp32",),
}


def _capabilities(variant: _Variant) -> Capabilities:
    return Capabilities(
        devices=("cuda",),
        dtypes=_HALF,
        min_sm=80,
        architectures=variant.architectures,
        max_head_dim=128,
        masks=variant.masks,
        mask_with_causal=False,
        causal="any",
        gqa=True,
        lse=variant.function != "sageattn_varlen",
        options=variant.options,
        quantised=True,
        tolerance=variant.tolerance,
    )


def _forward(variant: _Variant) -> Callable[[AttentionCall], AttentionOutput]:
    def forward(call: AttentionCall) -> AttentionOutput:
        if call.is_causal:
            call = adapt.top_left_by_slicing(call)
        arguments = _arguments(variant, call)
        if variant.function == "sageattn_varlen":
            return _packed_forward(variant, call, arguments)
        key, value = call.key, call.value
        if call.return_lse:
            # Version 2.2.0 forms the LSE of grouped heads along the wrong axis.
            key, value = adapt.expand_kv(call)
        extras = () if call.mask is None else (_mask(call),)
        out, lse = traced.run(variant.name, call.query, key, value, extras, arguments)
        if call.mask is not None:
            out, lse = _without_empty_rows(call, out, lse)
        return AttentionOutput(out, lse)

    return forward


def _packed_forward(variant: _Variant, call: AttentionCall, arguments: Arguments) -> AttentionOutput:
    batch, q_len, _, _ = call.query.shape
    arguments = arguments._replace(longest_query=q_len, longest_key=call.key.shape[1])
    query, key, value, *starts, empty = packing.sequences(call.query, call.key, call.value, call.mask)
    out, _ = traced.run(variant.name, query, key, value, tuple(starts), arguments)
    out = out.unflatten(0, (batch, q_len))
    return AttentionOutput(out if empty is None else out.masked_fill(empty[:, None, None, None], 0.0))


def _mask(call: AttentionCall) -> Tensor:
    """The mask as the Triton kernel reads it: scores are in units of log 2 there, and -inf would turn into NaN."""
    mask = adapt.as_dense_mask(call)
    assert mask is not None
    if mask.dtype == torch.bool:
        return mask
    dtype = call.query.dtype
    # -3e4 is far below any score, and far enough from the end of float16.
    return derived(mask, ("log2", dtype), lambda: torch.mul(mask, _LOG2_E).clamp(min=-3e4).to(dtype))


def _without_empty_rows(call: AttentionCall, out: Tensor, lse: Tensor | None) -> tuple[Tensor, Tensor | None]:
    empty = adapt.rows_without_key(call)
    assert empty is not None
    out = out.masked_fill(empty.transpose(1, 2)[..., None], 0.0)
    return out, None if lse is None else lse.masked_fill(empty, float("-inf"))


def _arguments(variant: _Variant, call: AttentionCall) -> Arguments:
    names = tuple(sorted(call.options))
    for name in names:
        known = _values(variant, name)
        if call.options[name] not in known:
            raise InvalidCallError(f"{name} of {variant.name!r} is one of {known}, got {call.options[name]!r}.")
    values = tuple(str(call.options[name]) for name in names)
    return Arguments(call.scale, call.is_causal, return_lse=call.return_lse, option_names=names, option_values=values)


def _values(variant: _Variant, option: str) -> tuple:
    if option.startswith("smooth"):
        return (True, False)
    return ("per_warp", "per_thread") if option == "qk_quant_gran" else _ACCUMULATORS[variant.function]


def _options(arguments: Arguments) -> dict:
    pairs = zip(arguments.option_names, arguments.option_values)
    return {name: value == "True" if name.startswith("smooth") else value for name, value in pairs}


def _body(variant: _Variant) -> traced.Body:
    def body(query: Tensor, key: Tensor, value: Tensor, extras: Extras, arguments: Arguments):
        function = source.functions(variant.source)[variant.function]
        query, key, value = (
            tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (query, key, value)
        )
        if _is_first_generation(variant):
            return _first_generation(function, query, key, value, extras, arguments), None
        accepted = source.parameters(function)
        keywords = {"is_causal": arguments.is_causal, "sm_scale": arguments.scale, **_options(arguments)}
        if variant.function == "sageattn_varlen":
            keywords.update(cu_seqlens_q=extras[0], cu_seqlens_k=extras[1])
            keywords.update(max_seqlen_q=arguments.longest_query, max_seqlen_k=arguments.longest_key)
        else:
            keywords["tensor_layout"] = "NHD"
            if extras and extras[0] is not None:
                keywords["attn_mask"] = extras[0]
        if arguments.return_lse:
            keywords["return_lse"] = True
        dropped = set(keywords) - accepted
        if dropped:
            raise TypeError(f"{variant.function} would silently drop {', '.join(sorted(dropped))}")
        result = function(query, key, value, **keywords)
        return result if arguments.return_lse else (result, None)

    return body


def _first_generation(
    function: Callable, query: Tensor, key: Tensor, value: Tensor, extras: Extras, arguments: Arguments
) -> Tensor:
    if not _options(arguments).get("smooth_k", True):
        raise InvalidCallError("smooth_k=False needs SageAttention 2: its version 1 is exact for centred keys only.")
    if query.dim() == 4:
        return sage_1.dense(function, query, key, value, arguments.scale, arguments.is_causal)
    query_starts, key_starts = extras[:2]
    assert query_starts is not None and key_starts is not None
    longest = arguments.longest_query, arguments.longest_key
    starts = query_starts, key_starts
    return sage_1.packed(function, query, key, value, starts, longest, arguments.scale, arguments.is_causal)


def _is_first_generation(variant: _Variant) -> bool:
    if isinstance(variant.source, HubKernel):
        return False
    found = source.installed_version("sageattention")
    # Without metadata, the narrower and more careful reading.
    return found is None or source.release(found) < (2,)


def _extra_reasons(variant: _Variant) -> Callable[[CallSpec], tuple[Reason, ...]]:
    return lambda spec: (*_limits(variant, spec), *known_bad.reasons(variant.name, spec))


def _limits(variant: _Variant, spec: CallSpec) -> tuple[Reason, ...]:
    if variant.name not in ("sage", "sage_varlen"):
        return ()
    if not _is_first_generation(variant):
        return _limits_2(variant, spec)
    dims = (64, 128) if variant.name == "sage_varlen" else (64, 96, 128)
    reasons = []
    if spec.head_dim not in dims:
        what = f"SageAttention 1 takes head_dim {', '.join(map(str, dims))}, not {spec.head_dim}"
        reasons.append(Reason("head_dim", what, f"use backend='native', or install SageAttention 2: {_GIT}"))
    if spec.lse:
        what = "SageAttention 1 does not return the LSE"
        reasons.append(Reason("lse", what, f"install SageAttention 2: {_GIT}"))
    return tuple(reasons)


def _limits_2(variant: _Variant, spec: CallSpec) -> tuple[Reason, ...]:
    reasons = []
    if variant.name == "sage" and spec.architecture and spec.architecture not in _NEW_ARCHITECTURES:
        what = f"SageAttention 2 has no kernel for {spec.architecture}"
        reasons.append(Reason("arch", what, "use backend='_sage_qk_int8_pv_fp16_triton' or 'native'."))
    if variant.name == "sage" and "smooth_k" in spec.options:
        what = "sageattn of SageAttention 2 drops smooth_k"
        reasons.append(Reason("options", what, "use one of the backend='_sage_qk_...' variants, which take it."))
    return tuple(reasons)


def _adapters(variant: _Variant) -> Callable[[CallSpec], tuple[str, ...]]:
    def adapters(spec: CallSpec) -> tuple[str, ...]:
        names: tuple[str, ...] = ()
        if variant.function == "sageattn_varlen":
            names += ("pack_keys",) if spec.mask != "none" else ()
        elif spec.lse and spec.heads != spec.kv_heads:
            names += ("expand_kv",)
        return names + ((alignment.SPLIT,) if alignment.splits(spec) else ())

    return adapters


def _bind(variant: _Variant) -> Callable[[AttentionCall], Callable[[Tensor, Tensor, Tensor], Tensor] | None]:
    def bind(call: AttentionCall) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
        if variant.function == "sageattn_varlen" or call.mask is not None or call.return_lse:
            return None
        if call.is_causal and call.query.shape[1] != call.key.shape[1]:
            return None
        body, arguments = _bodies[variant.name], _arguments(variant, call)
        return lambda query, key, value: body(query, key, value, (), arguments)[0]

    return bind


def _backend(variant: _Variant) -> Backend:
    capabilities = (_capabilities(variant),)
    _bodies[variant.name] = _body(variant)
    traced.register(variant.name, _bodies[variant.name])
    return Backend(
        name=variant.name,
        family="sage",
        capabilities=capabilities,
        forward=alignment.any_lengths(_forward(variant)),
        load=lambda: source.load(variant.source),
        probe=lambda: source.probe(variant.source, capabilities),
        extra_reasons=_extra_reasons(variant),
        adapters=_adapters(variant),
        bind=_bind(variant),
        external=True,
        url="https://github.com/thu-ml/SageAttention",
        summary=variant.summary,
    )


_bodies: dict[str, traced.Body] = {}
BACKENDS = {variant.name: _backend(variant) for variant in _VARIANTS}

SAGE = BACKENDS["sage"]
SAGE_HUB = BACKENDS["sage_hub"]
SAGE_VARLEN = BACKENDS["sage_varlen"]
SAGE_FP8_CUDA = BACKENDS["_sage_qk_int8_pv_fp8_cuda"]
SAGE_FP8_CUDA_SM90 = BACKENDS["_sage_qk_int8_pv_fp8_cuda_sm90"]
SAGE_FP16_CUDA = BACKENDS["_sage_qk_int8_pv_fp16_cuda"]
SAGE_FP16_TRITON = BACKENDS["_sage_qk_int8_pv_fp16_triton"]
