"""Time several ways of doing one thing, in turns, so that clocks and neighbours weigh on each alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from typing import NamedTuple, TypeVar

import torch

# A sample lasts at least this long, so that the clock's step does not show; on an accelerator longer, because there
# launching the first calls may take as long as they run.
_SAMPLE_S = 0.5e-3
_DEVICE_SAMPLE_S = 2e-3
_MIN_ROUNDS = 5
_MAX_ROUNDS = 40
# Who needs this many times as long as the best at the first look is not timed further.
_HOPELESS = 4.0


# What is faster must be so by this much before it replaces the choice in use: below lies what timings differ by anyway.
MARGIN = 0.02
# The name of a way to do the thing.
Way = TypeVar("Way", bound=Hashable)


class Timing(NamedTuple):
    """Microseconds per call.

    Attributes:
        median_us: median over the samples. spread_us: difference of their quartiles. samples: how many.
    """

    median_us: float
    spread_us: float
    samples: int


def measure(
    ways: Mapping[Way, Callable[[], object]], device: torch.device, budget_s: float = 0.2, policy: str = "eager"
) -> dict[Way, Timing]:
    """Time each of ``ways``.

    Args:
        ways: functions without arguments, by name; each has run before.
        device: where they run. CUDA is timed with events, everything else with a clock after synchronising.
        budget_s: seconds to spend on each, roughly.
        policy: ``"graph"`` times replays of a CUDA graph, which have no Python cost.

    Example:
        >>> import torch
        >>> timings = measure({"short": lambda: sum(range(10)), "long": lambda: sum(range(100000))}, torch.device("cpu"), 0.02)
        >>> timings["short"].median_us < timings["long"].median_us
        True
    """
    if policy == "graph" and device.type == "cuda":
        ways = {name: captured(run) for name, run in ways.items()}
    first = {name: min(_sample(run, device, 1) for _ in range(2)) for name, run in ways.items()}
    if not first:
        return {}
    best = min(first.values())
    shortest = _SAMPLE_S if device.type == "cpu" else _DEVICE_SAMPLE_S
    samples: dict[Way, list[float]] = {name: [seconds] for name, seconds in first.items()}
    running = [name for name in ways if first[name] <= _HOPELESS * best or first[name] < _SAMPLE_S]
    repeats = {name: max(1, min(1000, round(shortest / max(first[name], 1e-7)))) for name in running}
    per_round = sum(first[name] * repeats[name] for name in running)
    rounds = max(_MIN_ROUNDS, min(_MAX_ROUNDS, int(budget_s * len(running) / max(per_round, 1e-7))))
    for name in running:
        samples[name].clear()
    for turn in range(rounds):
        # Each starts as often as it ends a round.
        for name in running if turn % 2 == 0 else reversed(running):
            samples[name].append(_sample(ways[name], device, repeats[name]))
    return {name: _timing(values) for name, values in samples.items()}


def fastest(times: Mapping[Way, Timing], incumbent: Way, margin: float) -> Way:
    """The fastest, if it beats the incumbent by more than the margin and the spread of both; else the incumbent."""
    best = min(times, key=lambda name: times[name].median_us)
    held, found = times[incumbent], times[best]
    noise = max(margin * held.median_us, min(held.spread_us, found.spread_us) / 2)
    return best if held.median_us - found.median_us > noise else incumbent


def ranking(times: Mapping[str, Timing], base: str, rejected: Mapping[str, str]) -> list[str]:
    """A line for each, fastest first, with its speed over that of ``base``; then what was rejected, and why."""
    ordered = sorted(times.items(), key=lambda item: item[1].median_us)
    held = times[base].median_us
    lines = [
        f"  {name:32} {timing.median_us:12.1f} us  {held / timing.median_us:5.2f} x {base}" for name, timing in ordered
    ]
    return [*lines, *(f"  {name:32} rejected: {why}" for name, why in rejected.items())]


def captured(run: Callable[[], object]) -> Callable[[], object]:
    """A function that replays ``run`` as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type not in ("cpu", "meta"):
        torch.accelerator.synchronize(device)


def _sample(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Seconds per call."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # As in a model, the device is busy while the first timed call is launched.
        run()
        start.record()
        for _ in range(repeats):
            run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000.0 / repeats
    synchronise(device)
    began = time.perf_counter()
    for _ in range(repeats):
        run()
    synchronise(device)
    return (time.perf_counter() - began) / repeats


def _timing(seconds: list[float]) -> Timing:
    in_us = sorted(value * 1e6 for value in seconds)
    spread = 0.0
    if len(in_us) >= 4:
        low, _, high = statistics.quantiles(in_us, n=4)
        spread = high - low
    return Timing(statistics.median(in_us), spread, len(in_us))
