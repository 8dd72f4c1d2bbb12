"""All backends on one call, timed in turns, each beside its error; no speed-up is given for a wrong result."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from .. import registry
from ..call import AttentionCall, CallSpec, spec_of
from ..errors import AttentionDispatchError
from ..resolve import verdict_on
from . import exactness, shapes
from .candidates import candidates, gradients, runner
from .measure import measure, synchronise
from .shapes import Shape


class Row(NamedTuple):
    """One backend on one call.

    Attributes:
        shape, backend: which. state: ``"ok"``, ``"wrong"``, ``"failed"`` or ``"refused"``; ``what`` says why not.
        us: median microseconds. tflops: by the operations of exact attention.
        speedup: time of ``native`` over this time; None for a wrong result.
        relative_l2, largest: error of the output against float64 on sampled rows. gradient_l2: the largest of the
            gradients, where the call needs them.
        peak_bytes: memory beyond the inputs, CUDA only. first_call_s: with imports and compilation.
        lse, grad: whether a small call with it is right: ``"ok"``, ``"no"`` (refused) or ``"wrong"``.
    """

    shape: str
    backend: str
    state: str
    what: str = ""
    us: float | None = None
    spread_us: float | None = None
    tflops: float | None = None
    speedup: float | None = None
    relative_l2: float | None = None
    largest: float | None = None
    gradient_l2: float | None = None
    peak_bytes: int | None = None
    first_call_s: float | None = None
    lse: str = ""
    grad: str = ""


def bench(
    shape: Shape,
    device: torch.device,
    *,
    names: Sequence[str] | None = None,
    quantised: bool = True,
    budget_s: float = 0.3,
    policy: str = "eager",
    check_small: bool = True,
    progress: Callable[[str], None] = lambda name: None,
) -> list[Row]:
    """Measure one shape on all backends that are ready, or on those named; those that cannot run it say why.

    Args:
        names: backends; None takes all that can run the call without building the score matrix.
        quantised: include 8-bit backends where ``names`` is None.
        check_small: also check LSE and gradients of each backend on small calls.
    """
    call = shapes.inputs(shape, device)
    with torch.set_grad_enabled(shape.grad):
        spec = spec_of(call)
    backends = candidates(spec, quantised, names)
    rows = [_refused(shape, name, spec) for name in names or () if name not in {b.name for b in backends}]
    exact = exactness.sample(call)
    slopes = exactness.sample_gradients(call) if spec.grad else None
    measured: dict[str, Row] = {}
    ways: dict[str, Callable[[], Any]] = {}
    for backend in backends:
        progress(backend.name)
        run = runner(backend, call, spec)
        row = _first_run(shape, backend, run, call, exact, spec)
        if slopes is not None and row.state == "ok":
            row = _check_gradients(row, backend, call, slopes, spec)
        measured[backend.name] = row
        if row.state != "failed":
            ways[backend.name] = run
    timings = measure(ways, device, budget_s, policy)
    base = timings.get("native") if measured.get("native", Row("", "", "wrong")).state == "ok" else None
    for name, row in measured.items():
        if name in timings:
            timing = timings[name]
            right = row.state == "ok"
            row = row._replace(
                us=timing.median_us,
                spread_us=timing.spread_us,
                tflops=shape.flops / timing.median_us / 1e6 if right else None,
                speedup=base.median_us / timing.median_us if base is not None and right else None,
            )
        if check_small and row.state != "failed":
            row = row._replace(lse=_small(name, device.type, "lse"), grad=_small(name, device.type, "grad"))
        rows.append(row)
    return sorted(rows, key=lambda row: (row.state != "ok", row.us or math.inf))


def _refused(shape: Shape, name: str, spec: Any) -> Row:
    if name not in registry.names():
        return Row(str(shape), name, "refused", "no such backend")
    reasons = verdict_on(name, spec).reasons
    return Row(str(shape), name, "refused", "; ".join(reason.what for reason in reasons) or "found wrong by doctor")


def _first_run(shape: Shape, backend: Any, run: Callable[[], Any], call: AttentionCall, exact: Any, spec: Any) -> Row:
    device = call.query.device
    began = time.perf_counter()
    try:
        out = run().out
        synchronise(device)
        first = time.perf_counter() - began
        peak = _peak(run, device)
    except Exception as error:  # whatever a kernel raises is its row
        return Row(str(shape), backend.name, "failed", f"{type(error).__name__}: {error}")
    row = Row(str(shape), backend.name, "ok", peak_bytes=peak, first_call_s=first)
    if exact is None:
        return row
    found = exactness.error_of(out, exact)
    wrong = exactness.problem(backend, spec, found)
    return row._replace(
        state="wrong" if wrong else "ok", what=wrong or "", relative_l2=found.relative_l2, largest=found.largest
    )


def _check_gradients(
    row: Row, backend: Any, call: AttentionCall, slopes: exactness.GradientSample, spec: CallSpec
) -> Row:
    try:
        errors = exactness.gradient_errors(gradients(backend, call, slopes.grad_out), slopes)
    except Exception as error:  # whatever a kernel raises is its row
        return row._replace(state="failed", what=f"backward: {type(error).__name__}: {error}")
    wrong = exactness.gradient_problem(backend, spec, errors)
    return row._replace(
        state="wrong" if wrong else "ok", what=wrong or "", gradient_l2=max(e.relative_l2 for e in errors.values())
    )


def _peak(run: Callable[[], Any], device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    synchronise(device)
    return torch.cuda.max_memory_allocated(device) - before


@lru_cache(maxsize=256)
def _small(name: str, device: str, what: str) -> str:
    """Whether the LSE or the gradients of a backend are right on small calls."""
    from ..testing import ConformanceError, check_conformance, conformance_cases

    wanted = {"lse": ("causal_lse", "padding_right_lse"), "grad": ("whole_blocks_grad", "causal_grad")}[what]
    served = False
    for case in conformance_cases(device):
        if case.name in wanted:
            try:
                served |= check_conformance(name, case, device).status == "computed"
            except (ConformanceError, AttentionDispatchError, RuntimeError):
                return "wrong"
    return "ok" if served else "no"
