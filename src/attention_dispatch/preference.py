"""Which backend first, per platform. Each order names the measurement behind it, or says that there is none.

What was measured on this machine (``tuning.store``) comes before these orders.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from . import known_bad, registry
from .call import CallSpec
from .tuning import store
from .tuning.store import Extent

UNTESTED = "untested"


class Order(NamedTuple):
    """An order of preference and where it comes from.

    Attributes:
        exact: names in order.
        measured: the dated measurement, or :data:`UNTESTED`.
        plain: names that come first for calls without a mask, window, softcap or gradients.
        padded: names that come first for key-padding masks without gradients.
        first_from: smallest number of scores per head (q times k) at which ``plain`` and ``padded`` count.
        quantised: 8-bit names in order.
        quantised_from: smallest length of both q and k at which these come before ``exact``.
    """

    exact: tuple[str, ...]
    measured: str
    plain: tuple[str, ...] = ()
    padded: tuple[str, ...] = ()
    first_from: int = 0
    quantised: tuple[str, ...] = ()
    quantised_from: int = 0


_LAST = ("_native_math", "reference")
_CUDA = ("native", "_native_cudnn", "_native_flash", "flash", "triton_flash", "_native_efficient", "xformers", "flex")
_SAGE = ("sage", "triton_sage", "triton_sage_fp16")


def _cuda(*quantised: str) -> Order:
    return Order((*_CUDA, *_LAST), UNTESTED, quantised=(*quantised, *_SAGE))


ORDERS: dict[str, Order] = {
    "sm_90": Order(
        (*_CUDA, *_LAST),
        "H100 80GB HBM3, torch 2.11.0+cu130, 2026-11-25, bfloat16, 24 heads, TFLOP/s: at 1x16384 head_dim 128 "
        "FlashAttention-3 748, cuDNN 649, triton_flash 700, aten flash 356, efficient 183; causal 761, 656, 717; head_dim "
        "64 585, 503, 481; at 1x1024 cuDNN 368, FlashAttention-3 232, triton_flash 146; with key padding at 4250 "
        "triton_flash 438, cuDNN 267; 8-bit at 16384 triton_sage 946, sage 778; at 1024 triton_sage 97; forward and "
        "backward at 4096 cuDNN 585, triton_flash 439",
        plain=("_flash_3",),
        # At 1x4250, the last quarter padded, eager: FlashAttention-3 packed 381 us, triton_flash 504, native 673.
        padded=("_flash_varlen_3", "triton_flash"),
        # At 1x1024 and 1x2048 the host decides: FlashAttention-3 232 and 625 against cuDNN's 368 and 593, with head_dim 64
        # 41 and 291 against 132 and 414. From 1x4096 and 32768x512 on it was faster wherever it was measured.
        first_from=4096 * 4096,
        quantised=("triton_sage", "_sage_qk_int8_pv_fp8_cuda_sm90", "triton_sage_fp16", "sage"),
        # At 1x4096 FlashAttention-3 was faster (722 and 694), at 1x8192 the 8-bit kernel (760 and 852).
        quantised_from=8192,
    ),
    "sm_80": _cuda("_sage_qk_int8_pv_fp16_cuda"),
    "sm_86": _cuda("_sage_qk_int8_pv_fp16_cuda"),
    "sm_89": _cuda("_sage_qk_int8_pv_fp8_cuda"),
    "sm_100": _cuda(),
    "sm_120": _cuda("_sage_qk_int8_pv_fp8_cuda"),
    "rocm": Order(("native", "_native_flash", "aiter_fa2_hub", "_native_efficient", "flex", *_LAST), UNTESTED),
    "cuda": _cuda(),
    "npu": Order(("native", "_native_npu", *_LAST), UNTESTED),
    "xla": Order(("native", "_native_xla", *_LAST), UNTESTED),
    "xpu": Order(("native", "flex", *_LAST), UNTESTED),
    "cpu": Order(
        ("native", "_native_flash", "_native_math", "flex", "reference"),
        "AMD EPYC, 2 threads of a shared machine, torch 2.13.0+cpu, 2026-11-25, 8 heads of 64, float32, speed over "
        "native: at 1x1024 aten flash 0.95, math 0.25, flex 0.12, reference 0.07; causal 0.96, 0.13, 0.07, 0.05; key "
        "padding 1.02, 0.35, 0.16, 0.09; forward and backward at 1x512 0.96, 0.42, refused, 0.16",
    ),
}
_FALLBACK = Order(("native", *_LAST), UNTESTED)

# TFLOP/s for 1 x 16384 x 24 heads, by (head_dim, causal): the run of the sm_90 order; flex and flash_4 of 2026-11-23.
RATES: dict[str, dict[tuple[int, bool], dict[str, float]]] = {
    "sm_90": {
        (128, False): {"_native_cudnn": 649, "native": 649, "_native_flash": 356, "_native_efficient": 183, "flex": 477, "_flash_3": 748, "flash_4": 712, "triton_flash": 700, "triton_sage": 946, "triton_sage_fp16": 644, "sage": 778, "_sage_qk_int8_pv_fp8_cuda_sm90": 778},
        (64, False): {"_native_cudnn": 503, "native": 503, "_native_flash": 312, "_native_efficient": 136, "flex": 401, "_flash_3": 585, "flash_4": 555, "triton_flash": 481, "triton_sage": 620, "triton_sage_fp16": 483, "sage": 508, "_sage_qk_int8_pv_fp8_cuda_sm90": 508},
        (128, True): {"_native_cudnn": 656, "native": 656, "_native_flash": 337, "_native_efficient": 172, "flex": 412, "_flash_3": 761, "flash_4": 622, "triton_flash": 717, "triton_sage": 845, "triton_sage_fp16": 608, "sage": 638, "_sage_qk_int8_pv_fp8_cuda_sm90": 638},
    }
}  # fmt: skip


def platform(spec: CallSpec) -> str:
    """The key of :data:`ORDERS` that applies to a call."""
    if spec.architecture in ORDERS:
        return spec.architecture
    return "rocm" if spec.architecture.startswith("gfx") else spec.device


def measurement(spec: CallSpec) -> str:
    """What the static order for a call rests on."""
    return ORDERS.get(platform(spec), _FALLBACK).measured


def order(spec: CallSpec, quantised: bool = False, lengths: Extent | None = None) -> tuple[str, ...]:
    """Backend names for ``auto`` in order of preference; quantised ones only if asked for.

    Measured choices come first, then the static order. What a check on this machine found wrong is left out, and what
    is known to be doubtful for such calls comes last.
    """
    names = dict.fromkeys((*store.ranking(spec, lengths, quantised), *static_order(spec, quantised, lengths)))
    known = set(registry.names())
    sound = [name for name in names if name in known and not found_wrong(name, spec)]
    return tuple(sorted(sound, key=lambda name: bool(known_bad.notes(name, spec)) and not _verified(name, spec)))


def static_order(spec: CallSpec, quantised: bool = False, lengths: Extent | None = None) -> tuple[str, ...]:
    """The order for a platform before anything was measured on this machine."""
    found = ORDERS.get(platform(spec), _FALLBACK)
    first: tuple[str, ...] = ()
    # Lengths are unknown while a graph is traced, and what is compiled is large.
    if not spec.grad and (lengths is None or lengths.q_len * lengths.k_len >= found.first_from):
        if spec.mask == "key_padding":
            first = found.padded
        elif spec.mask == "none" and not (spec.window or spec.softcap):
            first = found.plain
    exact = (*first, *found.exact)
    if not quantised:
        return tuple(dict.fromkeys(exact))
    # Sizes are unknown while a graph is traced; whoever asked for 8 bits has long sequences in mind.
    long = lengths is None or min(lengths.q_len, lengths.k_len) >= found.quantised_from
    return tuple(dict.fromkeys((*found.quantised, *exact) if long else (*exact, *found.quantised)))


def found_wrong(name: str, spec: CallSpec) -> bool:
    """Whether the last check of a backend on this machine (``attention-dispatch doctor``) found it wrong."""
    verdict = store.verdict(name, spec.device)
    return verdict is not None and verdict["state"] != "ok"


def _verified(name: str, spec: CallSpec) -> bool:
    verdict = store.verdict(name, spec.device)
    return verdict is not None and verdict["state"] == "ok"


@lru_cache(maxsize=4096)
def bucket(lengths: Extent | None) -> object:
    """What of the lengths may change a choice; part of the key under which plans are remembered."""
    if lengths is None:
        return None
    return (
        store.rounded(lengths.batch),
        store.rounded(lengths.q_len),
        store.rounded(lengths.k_len),
        lengths.contiguous,
        min(lengths.q_len, lengths.k_len) >= _LONG,
        lengths.q_len * lengths.k_len >= _LARGE,
    )


_LONG = max(order.quantised_from for order in ORDERS.values())
_LARGE = max(order.first_from for order in ORDERS.values())
