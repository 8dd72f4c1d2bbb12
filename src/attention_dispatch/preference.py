"""Which backend first, per platform. Each order names the measurement behind it, or says that there is none."""

from __future__ import annotations

from typing import NamedTuple

from . import registry
from .call import CallSpec


class Order(NamedTuple):
    """An order of preference and where it comes from."""

    exact: tuple[str, ...]
    quantised: tuple[str, ...]
    measured: str


_FALLBACK = ("native", "_native_flash", "_native_math", "reference")

ORDERS: dict[str, Order] = {
    "sm_90": Order(
        ("native", "_native_cudnn", "_native_flash", "flex", "_native_efficient", "_native_math", "reference"),
        (),
        "H100 80GB HBM3, torch 2.11.0+cu130, 2026-11-23: cuDNN 625-680 TFLOP/s, flex 464-477, aten flash 348-358",
    ),
    "cuda": Order(
        ("native", "_native_cudnn", "_native_flash", "_native_efficient", "flex", "_native_math", "reference"),
        (),
        "untested",
    ),
    "cpu": Order(("native", "_native_flash", "_native_math", "flex", "reference"), (), "untested"),
}


def platform(spec: CallSpec) -> str:
    """The key of :data:`ORDERS` that applies to a call."""
    return spec.architecture if spec.architecture in ORDERS else spec.device


def order(spec: CallSpec, quantised: bool = False, lengths: tuple[int, int, int] | None = None) -> tuple[str, ...]:
    """Backend names for ``auto`` in order of preference; quantised ones only if asked for."""
    found = ORDERS.get(platform(spec))
    names = _FALLBACK if found is None else (found.quantised if quantised else ()) + found.exact
    known = registry.names()
    return tuple(name for name in names if name in known)


def bucket(lengths: tuple[int, int, int] | None) -> object:
    """What of the lengths may change a choice; part of the key under which plans are remembered."""
    return None
