"""Check backends in a child process: what crashes, hangs or corrupts the device there is reported, not fatal here.

python -m attention_dispatch.tuning.health --device cpu --cases quick native flex
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from .. import registry
from . import store

STATES = ("ok", "unchecked", "absent", "wrong", "crashed", "hung", "failed")
# After any other, the child may be in no state to judge the next backend.
HARMLESS = ("ok", "unchecked", "absent")
# Inference with each mask kind, causal masking, an LSE, gradients, and views: one case for every promise.
QUICK = (
    "plain_fp32",
    "plain_bf16",
    "plain_fp16",
    "whole_blocks_grad",
    "block_plus_one",
    "causal_lse",
    "causal_grad",
    "causal_fewer_queries",
    "padding_scattered",
    "padding_empty_lse",
    "bool_per_head",
    "bias_QK_grad",
    "gqa_grad",
    "window_5_3",
    "layout_transposed",
    "dim_128_grad",
)
# Compiling a kernel at its first call takes up to a minute on a busy machine.
TIMEOUT_S = 120.0


class Health(NamedTuple):
    """What was found out about one backend.

    Attributes:
        backend: its name. state: ``"ok"``, ``"unchecked"`` (refused every case), ``"absent"`` (cannot be used here), ``"wrong"``
            (deviates from float64), ``"crashed"`` (ended its process), ``"hung"`` or ``"failed"`` (raised).
        what: the case and what happened; empty if ok.
        computed, refused: number of cases.
    """

    backend: str
    state: str
    what: str = ""
    computed: int = 0
    refused: int = 0


def check(
    names: Sequence[str],
    device: str,
    *,
    quick: bool = True,
    timeout_s: float = TIMEOUT_S,
    imports: Sequence[str] = (),
    progress: Callable[[Health], None] = lambda health: None,
) -> list[Health]:
    """Import and check backends in a child process that is replaced after each one that fails.

    Args:
        names: backends. device: ``"cpu"`` or ``"cuda"``.
        quick: a selection of cases instead of all.
        timeout_s: longest silence, that is, longest time for one case or for importing a backend; starting Python and
            torch has 120 s.
        imports: modules to import in the child first, such as those that register backends.
        progress: called with each result.
    """
    left = list(names)
    found = []
    while left:
        for health in _run_child(left, device, quick, timeout_s, imports):
            left.remove(health.backend)
            found.append(health)
            progress(health)
    return found


def remember(found: Sequence[Health], device: str) -> None:
    """Keep verdicts in the store, where ``auto`` heeds them."""
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    store.add(
        device,
        verdicts={
            health.backend: {"state": health.state, "what": health.what, "date": now}
            for health in found
            if health.state not in ("absent", "unchecked")
        },
    )


def _run_child(
    names: Sequence[str], device: str, quick: bool, timeout_s: float, imports: Sequence[str]
) -> Iterator[Health]:
    """Results until a backend is not ok; always at least one."""
    command = [sys.executable, "-m", __name__, "--device", device, "--cases", "quick" if quick else "all"]
    command += [f"--import={module}" for module in imports]
    # The child must see what this process could import, and no wish of the environment.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path)}
    for name in ("BACKEND", "CHECKS"):
        environment.pop(f"ATTENTION_DISPATCH_{name}", None)
        environment.pop(f"DIFFUSERS_ATTN_{name}", None)
    child = subprocess.Popen(
        [*command, *names], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, errors="replace"
    )
    lines: queue.Queue[str | None] = queue.Queue()
    errors: list[str] = []
    readers = [
        threading.Thread(target=_pump, args=(child.stdout, lines.put), daemon=True),
        threading.Thread(target=_pump, args=(child.stderr, errors.append), daemon=True),
    ]
    for reader in readers:
        reader.start()
    current, case, waiting = names[0], "", list(names)
    # Until torch and the modules to import are there, which says nothing about a backend.
    patience = max(timeout_s, TIMEOUT_S)
    try:
        while waiting:
            try:
                line = lines.get(timeout=patience)
            except queue.Empty:
                yield Health(current, "hung", f"{case or 'importing it'}: no answer for {patience:g} s")
                return
            if line is None:
                child.wait()
                last = "".join(part for part in errors[-3:] if part).strip()
                why = f"{case or 'importing it'}: the process ended with code {child.returncode}"
                yield Health(current, "crashed", f"{why}. {last}".strip())
                return
            event = _event(line)
            if event is None:
                continue
            patience = timeout_s
            if "started" in event:
                continue
            if "case" in event:
                current, case = event["backend"], event["case"]
                continue
            health = Health(**event)
            waiting.remove(health.backend)
            yield health
            if health.state not in HARMLESS:
                return
            if waiting:
                current, case = waiting[0], ""
    finally:
        child.kill()
        child.wait()
        for reader in readers:
            reader.join(timeout=5)


def _pump(stream: Any, take: Callable[[Any], object]) -> None:
    for line in stream:
        take(line)
    take(None)


def _event(line: str) -> dict[str, Any] | None:
    """An event of the child, or None for what a vendor printed."""
    if not line.startswith(_MARK):
        return None
    event: dict[str, Any] = json.loads(line.removeprefix(_MARK))
    return event


_MARK = "attention-dispatch: "


def _tell(event: dict[str, Any]) -> None:
    print(_MARK + json.dumps(event), flush=True)


def _check_one(name: str, device: str, quick: bool) -> Health:
    from ..testing import ConformanceError, check_conformance, conformance_cases

    status = registry.status(name)
    if not status.available:
        return Health(name, "absent", "; ".join(f"{reason.what} -> {reason.fix}" for reason in status.reasons))
    counts = {"computed": 0, "refused": 0}
    for case in conformance_cases(device):
        if quick and case.name not in QUICK:
            continue
        _tell({"backend": name, "case": case.name})
        try:
            counts[check_conformance(name, case, device).status] += 1
        except ConformanceError as error:
            return Health(name, "wrong", f"{case.name}: {error}", **counts)
        except Exception as error:  # whatever a vendor's kernel raises is the finding
            return Health(name, "failed", f"{case.name}: {type(error).__name__}: {error}", **counts)
    if not counts["computed"]:
        return Health(name, "unchecked", "it refused every case, so nothing is known of its results", **counts)
    return Health(name, "ok", "", **counts)


def main(arguments: Sequence[str] | None = None) -> None:
    """The child process: one line of JSON when it is ready, and per case and backend."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cases", choices=("quick", "all"), default="quick")
    parser.add_argument("--import", dest="imports", action="append", default=[])
    parser.add_argument("names", nargs="+")
    options = parser.parse_args(arguments)
    for module in options.imports:
        importlib.import_module(module)
    _tell({"started": True})
    for name in options.names:
        registry.get(name)
        health = _check_one(name, options.device, options.cases == "quick")
        _tell(health._asdict())
        if health.state not in HARMLESS:
            return


if __name__ == "__main__":
    main()
