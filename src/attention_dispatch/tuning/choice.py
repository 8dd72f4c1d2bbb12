"""Which backend is fastest for one call, measured on its own tensors."""

from __future__ import annotations

import datetime
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from .. import preference
from ..call import AttentionCall, AttentionOutput, CallSpec, describe
from ..registry import Backend
from ..resolve import extent_of
from . import exactness, store
from .candidates import candidates, gradients, runner
from .measure import MARGIN, Timing, fastest, measure, ranking


class Measurement(NamedTuple):
    """One kind of call, measured.

    Attributes:
        call: in words. key: in the store. exact: the choice for ``auto``. quantised: for ``auto_quantized``, None if no
            8-bit backend was measured. static: what the static order would have taken.
        times: by backend. errors: relative L2 by backend, the largest of output and gradients, where there is an exact
            result. rejected: backends whose result deviates or that failed, and why.
    """

    call: str
    key: str
    exact: str
    quantised: str | None
    static: str
    times: dict[str, Timing]
    errors: dict[str, float]
    rejected: dict[str, str]

    def __str__(self) -> str:
        title = f"{self.call}: {self.exact}" + (f", 8-bit: {self.quantised}" if self.quantised else "")
        return "\n".join([title, *ranking(self.times, self.static, self.rejected)])


def measure_call(
    call: AttentionCall,
    spec: CallSpec,
    *,
    quantised: bool = False,
    policy: str = "eager",
    margin: float = MARGIN,
    budget_s: float = 0.2,
    names: Sequence[str] | None = None,
    timer: Callable[..., dict[str, Timing]] = measure,
) -> Measurement | None:
    """Measure the candidates for one call on its own tensors; None where fewer than one gives a right result.

    Where the call needs gradients, forward and backward are timed together. Warns of each candidate whose output or
    gradients deviate from float64 by more than its tolerance.
    """
    backends = candidates(spec, quantised, names)
    exact = exactness.sample(call)
    slopes = exactness.sample_gradients(call) if spec.grad else None
    ways: dict[str, Callable[[], AttentionOutput]] = {}
    errors: dict[str, float] = {}
    rejected: dict[str, str] = {}
    for backend in backends:
        run = runner(backend, call, spec)
        why = _failure(backend, call, spec, run, exact, slopes, errors)
        if why is None:
            ways[backend.name] = run
        else:
            rejected[backend.name] = why
            warnings.warn(f"{backend.name!r} is not considered for {describe(call, spec)}: {why}.", stacklevel=2)
    times = timer(ways, call.query.device, budget_s, policy)
    if not times:
        return None
    eight_bit = {backend.name for backend in backends if backend.quantised}
    full = {name: timing for name, timing in times.items() if name not in eight_bit}
    order = [name for name in preference.static_order(spec, False, extent_of(call)) if name in full] or list(full)
    if not order:
        return None
    static = order[0]
    choice = fastest(full, static, margin)
    low = fastest(times, choice, margin) if eight_bit & times.keys() else None
    key = store.key(spec, extent_of(call), policy)
    return Measurement(describe(call, spec), key, choice, low, static, times, errors, rejected)


def _failure(
    backend: Backend,
    call: AttentionCall,
    spec: CallSpec,
    run: Callable[[], AttentionOutput],
    exact: exactness.Sample | None,
    slopes: exactness.GradientSample | None,
    errors: dict[str, float],
) -> str | None:
    """Why a candidate is out; also its first runs, so that compilation is not timed."""
    try:
        out = run().out
        found = None if slopes is None else gradients(backend, call, slopes.grad_out)
        run()
    except Exception as error:  # whatever a kernel raises on a call it declared to serve rules it out
        return f"it raised {type(error).__name__}: {error}"
    if exact is None:
        return None if spec.dropout or bool(out.isfinite().all()) else "its output is not finite"
    of_output = exactness.error_of(out, exact)
    errors[backend.name] = of_output.relative_l2
    why = exactness.problem(backend, spec, of_output)
    if why is None and slopes is not None and found is not None:
        by_name = exactness.gradient_errors(found, slopes)
        errors[backend.name] = max(of_output.relative_l2, *(item.relative_l2 for item in by_name.values()))
        why = exactness.gradient_problem(backend, spec, by_name)
    return why


def as_entry(found: Measurement, spec: CallSpec, quantised_names: Sequence[str]) -> dict[str, Any]:
    """A measurement as the store keeps it."""
    return {
        "exact": found.exact,
        "quantised": found.quantised,
        "quantised_names": sorted(quantised_names),
        "static": found.static,
        "times_us": {name: round(timing.median_us, 2) for name, timing in found.times.items()},
        "spread_us": {name: round(timing.spread_us, 2) for name, timing in found.times.items()},
        "errors": found.errors,
        "rejected": found.rejected,
        "call": found.call,
        "measured": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
