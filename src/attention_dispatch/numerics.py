"""Outputs compared with exact attention: once on request, or for every call of a process (the numerics checks)."""

from __future__ import annotations

import logging
import math
import threading
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import registry
from .call import AttentionCall, AttentionOutput, CallSpec, describe
from .module_name import module_name
from .resolve import Plan
from .tuning import exactness

_REFERENCE_SCORES = 1 << 22


class Check(NamedTuple):
    """An output compared with exact attention.

    Attributes:
        relative_l2, largest: see :class:`~attention_dispatch.tuning.exactness.Error`; NaN where not finite.
        allowed: largest ``relative_l2`` for this backend.
        finite_inputs: whether q, k and v were finite; if not, the cause lies before this module.
        finite: whether the output is.
    """

    relative_l2: float
    largest: float
    allowed: float
    finite_inputs: bool
    finite: bool

    @property
    def ok(self) -> bool:
        return self.finite and (math.isnan(self.relative_l2) or self.relative_l2 <= self.allowed)


def compare(call: AttentionCall, spec: CallSpec, plan: Plan, output: AttentionOutput) -> Check:
    """An output against exact attention; only its finiteness where there is nothing exact to compare with."""
    with torch.no_grad():
        out = output.out.detach()
        finite = bool(out.isfinite().all())
        inputs = all(bool(tensor.isfinite().all()) for tensor in (call.query, call.key, call.value))
        bound = exactness.allowed(plan.backend, spec)
        error = exactness.Error(float("nan"), float("nan"))
        if finite and inputs:
            exact = exactness.sample(call)
            if exact is not None:
                error = exactness.error_of(out, exact)
            elif not call.dropout_p and call.query.shape[1] * call.key.shape[1] <= _REFERENCE_SCORES:
                error = _reference_error(call, out)
        return Check(error.relative_l2, error.largest, bound, inputs, finite)


def _reference_error(call: AttentionCall, out: Tensor) -> exactness.Error:
    """For a BlockMask, whose rows cannot be sampled."""
    wide = out.double()
    exact = registry.get("reference").forward(call).out.double()
    size = max(float(exact.norm()), 1e-30)
    return exactness.Error(float((wide - exact).norm()) / size, float((wide - exact).abs().max()))


def finiteness(before: Check, call: AttentionCall, output: AttentionOutput) -> Check:
    """The check of an earlier call of this kind, with this call's NaN if it has any."""
    if bool(output.out.detach().isfinite().all()):
        return before
    inputs = all(bool(tensor.detach().isfinite().all()) for tensor in (call.query, call.key, call.value))
    return before._replace(finite=False, finite_inputs=inputs)


_log = logging.getLogger("attention_dispatch")
_checked: set[Any] = set()
_reported: set[tuple[str, str]] = set()
_lock = threading.Lock()


def shadow_check(call: AttentionCall, spec: CallSpec, plan: Plan, output: AttentionOutput) -> None:
    """Compare a call, once per module and kind, with exact attention, and every other one with what is finite.

    Runs for every call while ``ATTENTION_DISPATCH_CHECKS=numerics``. Every comparison is logged at level INFO under the
    name ``attention_dispatch``; what is wrong is a warning, once per module.
    """
    if not can_compare(spec):
        return
    module = module_name()
    key = (module, spec, plan.backend.name, call.query.shape, call.key.shape)
    with _lock:
        first = key not in _checked
        _checked.add(key)
    if first:
        check = compare(call, spec, plan, output)
        _log.info(
            "%s: %r on %r: relative error %.3g, allowed %.3g",
            describe(call, spec), module, plan.backend.name, check.relative_l2, check.allowed,
        )  # fmt: skip
    else:
        nan = float("nan")
        unknown = Check(nan, nan, exactness.allowed(plan.backend, spec), True, True)
        check = finiteness(unknown, call, output)
    # What is broken before attention would be reported by every module after it: once is enough.
    about = (module, plan.backend.name) if check.finite_inputs else ("", "inputs")
    if check.ok or about in _reported:
        return
    _reported.add(about)
    warnings.warn(f"{_finding(check, module, plan.backend.name)} ({describe(call, spec)}).", stacklevel=4)


def _finding(check: Check, module: str, backend: str) -> str:
    """What is wrong, in words."""
    where = f"in {module!r} " if module else ""
    if not check.finite_inputs:
        return f"q, k or v {where}are NaN or infinite: the cause lies before this attention"
    if not check.finite:
        return f"backend {backend!r} {where}returned NaN or infinity for finite q, k and v"
    return (
        f"backend {backend!r} {where}deviates from exact attention: relative error "
        f"{check.relative_l2:.3g} (allowed {check.allowed:.3g}), largest {check.largest:.3g}"
    )


def forget_checks() -> None:
    """Check and report everything again."""
    with _lock:
        _checked.clear()
        _reported.clear()


def can_compare(spec: CallSpec) -> bool:
    return spec.device != "meta" and not (spec.device == "cuda" and torch.cuda.is_current_stream_capturing())
