"""``with tuning():`` around real calls: measure each kind once, keep the fastest right backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .. import registry
from ..call import AttentionCall, CallSpec
from ..request import current
from ..resolve import extent_of
from . import store, tiles
from .choice import Measurement, as_entry, measure_call
from .measure import MARGIN
from .tiles import TileMeasurement, measure_tiles


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
        tiles: first measure tile shapes of this project's Triton kernels (8-bit ones with ``quantised``), which compiles
            each of them.

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
            quantised=self.quantised,
            names=self.names,
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
