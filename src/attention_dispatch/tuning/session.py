"""``with tuning():`` around real calls: measure each kind once, keep the fastest right backend."""

from __future__ import annotations

import datetime
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from .. import preference, registry
from ..call import AttentionCall, AttentionOutput, CallSpec, describe
from ..registry import Backend
from ..request import current
from ..resolve import extent_of
from . import exactness, store, tiles
from .candidates import candidates, gradients, runner
from .measure import Timing, fastest, measure
from .tiles import TileMeasurement, measure_tiles

# A newcomer must win by this much before it replaces the static choice: below lies what timings differ by anyway.
MARGIN = 0.02


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
        lines = [f"{self.call}: {self.exact}" + (f", 8-bit: {self.quantised}" if self.quantised else "")]
        base = self.times[self.static].median_us
        for name, timing in sorted(self.times.items(), key=lambda item: item[1].median_us):
            lines.append(f"  {name:32} {timing.median_us:12.1f} us  {base / timing.median_us:5.2f} x {self.static}")
        lines += [f"  {name:32} rejected: {why}" for name, why in self.rejected.items()]
        return "\n".join(lines)


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


class tuning:  # lower case: it is used like a function
    """Scope in which each new kind of attention call of this thread is measured on all backends that can run it.

    Results are the calls' own: nothing changes for the model but the time it takes. On leaving, the choices are stored
    on disk and count for ``auto`` from then on. In a distributed job every rank must enter and leave: all take over what
    rank 0 measured. Calls inside compiled graphs are not seen; run the model uncompiled once.

    Args:
        quantised: also measure 8-bit backends, for ``auto_quantized``; they never count for ``auto``.
        again: measure kinds of calls that are in the store already.
        policy: ``"eager"``, or ``"graph"`` to time replays of CUDA graphs, which have no Python cost.
        margin: fraction by which the fastest must beat the static choice to replace it.
        budget_s: seconds to spend on each candidate and kind of call, roughly.
        save: keep the results on disk; False keeps them in this process.
        names: measure these backends only; None takes all that may be the fastest.
        tiles: first measure tile shapes of this project's Triton kernels, which compiles each of them.

    Attributes:
        measurements: what was measured, in order. tiles: tile shapes likewise.

    Raises:
        ValueError: an unknown policy, at construction.

    Example:
        >>> import torch, attention_dispatch as ad
        >>> q = torch.randn(1, 64, 2, 32)
        >>> with ad.tuning(save=False, budget_s=0.01) as tuned:
        ...     out = ad.dispatch_attention_fn(q, q, q)
        >>> len(tuned.measurements)
        1
    """

    def __init__(
        self,
        *,
        quantised: bool = False,
        again: bool = False,
        policy: str = "eager",
        margin: float = MARGIN,
        budget_s: float = 0.2,
        save: bool = True,
        names: Sequence[str] | None = None,
        tiles: bool = False,
    ):
        if policy not in store.POLICIES:
            raise ValueError(f"policy must be one of {', '.join(store.POLICIES)}, got {policy!r}.")
        self.quantised = quantised
        self.again = again
        self.policy = policy
        self.margin = margin
        self.budget_s = budget_s
        self.save = save
        self.names = names
        self.measurements: list[Measurement] = []
        self.tiles: list[TileMeasurement] = []
        self._wants_tiles = tiles
        self._tiles: dict[str, dict[str, Any]] = {}
        self._entries: dict[str, dict[str, Any]] = {}
        self._seen: set[str] = set()
        self._devices: set[str] = set()

    def __enter__(self) -> tuning:
        state = current.state
        self._outer = state.observer
        state.observer = self._observe
        state.refresh()
        return self

    def __exit__(self, kind: Any, *exception: object) -> None:
        state = current.state
        state.observer = self._outer
        state.refresh()
        if kind is None:
            self._agree()
        rank = _rank()
        for device in {*self._entries, *self._tiles}:
            entries, tiles = self._entries.get(device), self._tiles.get(device)
            store.add(device, entries, tiles=tiles, save=self.save and rank == 0)

    def __str__(self) -> str:
        return "\n".join(map(str, (*self.tiles, *self.measurements))) or "nothing was measured"

    def _observe(self, call: AttentionCall, spec: CallSpec, request: Any, plan: Any, output: Any) -> Any:
        key = store.key(spec, extent_of(call), self.policy)
        if key not in self._seen and not _capturing(spec):
            self._seen.add(key)
            self._devices.add(spec.device)
            known = store.entries(spec.device).get(key)
            if self._wants_tiles:
                self._quietly(spec, lambda: self._measure_tiles(call, spec))
            if self.again or known is None or (self.quantised and known.get("quantised") is None):
                self._quietly(spec, lambda: self._measure(call, spec))
        return output if self._outer is None else self._outer(call, spec, request, plan, output)

    def _quietly(self, spec: CallSpec, action: Callable[[], None]) -> None:
        """Without observing what it calls, and without a trace in the caller's random numbers."""
        state = current.state
        observer, state.observer = state.observer, None
        state.refresh()
        try:
            with torch.random.fork_rng(enabled=True, devices=_devices(spec)):
                action()
        finally:
            state.observer = observer
            state.refresh()

    def _measure(self, call: AttentionCall, spec: CallSpec) -> None:
        found = measure_call(
            call,
            spec,
            quantised=self.quantised,
            policy=self.policy,
            margin=self.margin,
            budget_s=self.budget_s,
            names=self.names,
        )
        if found is not None:
            self.measurements.append(found)
            names = [name for name in found.times if registry.get(name).quantised]
            self._entries.setdefault(spec.device, {})[found.key] = as_entry(found, spec, names)

    def _measure_tiles(self, call: AttentionCall, spec: CallSpec) -> None:
        mine = self._tiles.setdefault(spec.device, {})
        there = {} if self.again else store.tiles(spec.device)
        for found in measure_tiles(
            call,
            spec,
            known=lambda key: str(key) in mine or str(key) in there,
            margin=self.margin,
            budget_s=self.budget_s,
        ):
            self.tiles.append(found)
            mine[str(found.key)] = tiles.as_entry(found)

    def _agree(self) -> None:
        """Take over what rank 0 measured, now or before."""
        if not _distributed():
            return
        box = [
            {device: {**store.entries(device), **self._entries.get(device, {})} for device in self._devices},
            {device: {**store.tiles(device), **self._tiles.get(device, {})} for device in self._devices},
        ]
        torch.distributed.broadcast_object_list(box, src=0)
        self._entries, self._tiles = box


def _distributed() -> bool:
    return (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    )


def _rank() -> int:
    return torch.distributed.get_rank() if _distributed() else 0


def _capturing(spec: CallSpec) -> bool:
    return spec.device == "cuda" and torch.cuda.is_current_stream_capturing()


def _devices(spec: CallSpec) -> list[int]:
    return [torch.cuda.current_device()] if spec.device == "cuda" else []
