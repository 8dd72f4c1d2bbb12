"""Tile shapes of this project's Triton kernels: measured on a call's own tensors, kept in the store, and followed."""

from __future__ import annotations

import datetime
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ..call import AttentionCall, AttentionOutput, CallSpec, describe
from ..kernels import tiles
from ..kernels.tiles import Tile, TileKey
from ..registry import Backend
from . import exactness, store
from .candidates import candidates, runner
from .measure import MARGIN, Timing, fastest, measure, ranking

FAMILY = "triton"
_warned: set[str] = set()


class TileMeasurement(NamedTuple):
    """One choice of a kernel, measured.

    Attributes:
        backend: whose call it was. key: what the choice holds for. choice: the tile. before: what was used until now.
        times: by tile. rejected: tiles that failed or gave a wrong result, and why.
    """

    backend: str
    key: TileKey
    choice: Tile
    before: Tile
    times: dict[Tile, Timing]
    rejected: dict[Tile, str]

    def __str__(self) -> str:
        times = {_words(tile): timing for tile, timing in self.times.items()}
        rejected = {_words(tile): why for tile, why in self.rejected.items()}
        ranked = ranking(times, _words(self.before), rejected)
        return "\n".join([f"{self.backend}, {self.key}: {_words(self.choice)}", *ranked])


def measure_tiles(
    call: AttentionCall,
    spec: CallSpec,
    *,
    quantised: bool = False,
    names: Sequence[str] | None = None,
    known: Callable[[TileKey], bool] = lambda key: False,
    margin: float = MARGIN,
    budget_s: float = 0.2,
    timer: Callable[..., dict[Any, Timing]] = measure,
) -> list[TileMeasurement]:
    """Measure tiles for the forward pass of each Triton backend that can run a call; warns of those that cannot after all.

    Args:
        quantised: 8-bit backends too, where ``names`` is None. names: of these backends only.
        known: which keys to leave alone. margin: fraction by which a tile must beat the one in use.
        budget_s: seconds to spend on each tile, roughly.
    """
    found = []
    forward = spec._replace(grad=False, mask_grad=False)
    exact = exactness.sample(call)
    for backend in candidates(forward, quantised, names):
        if backend.family != FAMILY:
            continue
        run = runner(backend, call, forward)
        try:
            asked = tiles.asked_by(run)
        except Exception as error:  # a kernel that fails here must not end the model that is being measured
            warnings.warn(f"{backend.name!r} failed on {describe(call, spec)}: {error}.", stacklevel=2)
            continue
        for key, before in asked.items():
            if known(key):
                continue
            one = _measure_key(backend, call, forward, run, exact, key, before, margin, budget_s, timer)
            if one is not None:
                found.append(one)
    return found


def _measure_key(
    backend: Backend,
    call: AttentionCall,
    spec: CallSpec,
    run: Callable[[], AttentionOutput],
    exact: exactness.Sample | None,
    key: TileKey,
    before: Tile,
    margin: float,
    budget_s: float,
    timer: Callable[..., dict[Any, Timing]],
) -> TileMeasurement | None:
    """None where the tile in use fails itself, which leaves nothing to compare with."""

    def with_tile(tile: Tile) -> Callable[[], AttentionOutput]:
        def way() -> AttentionOutput:
            with tiles.using(key, tile):
                return run()

        return way

    ways: dict[Tile, Callable[[], AttentionOutput]] = {}
    rejected: dict[Tile, str] = {}
    for tile in dict.fromkeys((before, *tiles.candidates(key))):
        way = with_tile(tile)
        try:
            out = way().out
            way()
        except Exception as error:  # what does not compile, or does not fit the GPU, is out
            rejected[tile] = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
            continue
        why = None if exact is None else exactness.problem(backend, spec, exactness.error_of(out, exact))
        if why is None:
            ways[tile] = way
        else:
            rejected[tile] = why
            warnings.warn(f"{_words(tile)} is wrong for {describe(call, spec)}: {why}.", stacklevel=2)
    if before not in ways:
        warnings.warn(f"{_words(before)} fails for {describe(call, spec)}: {rejected[before]}.", stacklevel=2)
        return None
    times = timer(ways, call.query.device, budget_s, "eager")
    return TileMeasurement(backend.name, key, fastest(times, before, margin), before, times, rejected)


def as_entry(found: TileMeasurement) -> dict[str, Any]:
    """A measurement as the store keeps it."""
    return {
        "tile": found.choice._asdict(),
        "us": round(found.times[found.choice].median_us, 2),
        "before_us": round(found.times[found.before].median_us, 2),
        "measured": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def follow_store(device: str) -> None:
    """Let the kernels use what the store holds for a device type; what no kernel can use is a miss with one warning."""
    found: dict[TileKey, Tile] = {}
    for text, entry in store.tiles(device).items():
        try:
            key, tile = TileKey.parse(text), Tile(**entry["tile"])
            problem = tiles.problem_with(key, tile)
        except (KeyError, TypeError, ValueError) as error:
            problem = f"{type(error).__name__}: {error}"
        if problem is None:
            found[key] = tile
        elif text not in _warned:
            _warned.add(text)
            warnings.warn(f"the tile stored for {text!r} is not used: {problem}.", stacklevel=3)
    tiles.use(found)


def in_words(facts: dict[str, Any]) -> str:
    """A stored tile."""
    try:
        return _words(Tile(**facts))
    except TypeError:
        return "not a tile"


def _words(tile: Tile) -> str:
    text = f"{tile.block_m} x {tile.block_n}, {tile.warps} warps, {tile.stages} stages"
    return text if tile.registers is None else f"{text}, {tile.registers} registers"
