"""What a dispatched call costs in Python: against raw torch, and against the dispatcher of diffusers.

Tensors are tiny, so that a call is nearly all overhead. Everything is measured in one process in interleaved batches,
and each figure is the fastest batch: the machine's other work only ever adds.

    python benchmarks/overhead.py [--json] [--batches 400] [--calls 200]
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from importlib.metadata import version

import torch
import torch.nn.functional as F

import attention_dispatch as ad

DISPATCH_GOAL = 0.85
SCOPE_GOAL = 0.55


class Processor:
    """Carries its setting like the processors of diffusers."""

    _attention_backend: str | None = None


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.processor = Processor()

    def forward(self, x):
        return ad.dispatch_attention_fn(x, x, x, backend=self.processor._attention_backend)


def calls(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> dict[str, Callable[[], object]]:
    """Name -> one call. Those of diffusers are missing where it is not installed."""

    def raw():
        return F.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        ).transpose(1, 2)

    block = Block()
    ad.set_attention_backend(block, "native")
    processor = block.processor

    def scope():
        with ad.attention_backend("native"):
            pass

    def scope_and_call():
        with ad.attention_backend("native"):
            ad.dispatch_attention_fn(query, key, value)

    found: dict[str, Callable[[], object]] = {
        "raw torch": raw,
        "no setting": lambda: ad.dispatch_attention_fn(query, key, value),
        "backend=": lambda: ad.dispatch_attention_fn(query, key, value, backend="native"),
        "auto": lambda: ad.dispatch_attention_fn(query, key, value, backend="auto"),
        "permission": lambda: ad.dispatch_attention_fn(query, key, value, backend=("_flash_3", "native")),
        "model setting": lambda: ad.dispatch_attention_fn(query, key, value, backend=processor._attention_backend),
        "scope entered": scope,
        "scope and call": scope_and_call,
        "nothing": lambda: None,
    }
    try:
        from diffusers.models import attention_dispatch as theirs
    except ImportError:
        return found

    def their_scope():
        with theirs.attention_backend("native"):
            pass

    def their_scope_and_call():
        with theirs.attention_backend("native"):
            theirs.dispatch_attention_fn(query, key, value)

    found["diffusers, no setting"] = lambda: theirs.dispatch_attention_fn(query, key, value)
    name = theirs.AttentionBackendName.NATIVE
    found["diffusers, backend="] = lambda: theirs.dispatch_attention_fn(query, key, value, backend=name)
    found["diffusers, scope entered"] = their_scope
    found["diffusers, scope and call"] = their_scope_and_call
    return found


def measure(functions: dict[str, Callable[[], object]], batches: int, per_batch: int) -> dict[str, float]:
    """Microseconds per call: the fastest of ``batches`` batches of each, taken in turns."""
    best = dict.fromkeys(functions, float("inf"))
    for function in functions.values():
        for _ in range(per_batch):
            function()
    for _ in range(batches):
        for name, function in functions.items():
            start = time.perf_counter_ns()
            for _ in range(per_batch):
                function()
            best[name] = min(best[name], (time.perf_counter_ns() - start) / per_batch / 1000)
    # The loop and the call of the lambda are not part of any of them.
    empty = best.pop("nothing")
    return {name: cost - empty for name, cost in best.items()}


def ratios(costs: dict[str, float]) -> dict[str, float]:
    """Each of ours divided by the same thing in diffusers; empty where it is not installed."""
    if "diffusers, no setting" not in costs:
        return {}
    pairs = {
        "no setting": "diffusers, no setting",
        "backend=": "diffusers, backend=",
        "auto": "diffusers, backend=",
        "model setting": "diffusers, backend=",
        "scope entered": "diffusers, scope entered",
        "scope and call": "diffusers, scope and call",
    }
    return {ours: costs[ours] / costs[theirs] for ours, theirs in pairs.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument("--batches", type=int, default=400)
    parser.add_argument("--calls", type=int, default=200, help="calls per batch")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tensors = [torch.randn(1, 8, 2, 16) for _ in range(3)]
    with torch.inference_mode():
        costs = measure(calls(*tensors), arguments.batches, arguments.calls)
    against = ratios(costs)
    facts = {"torch": torch.__version__, "machine": platform.machine(), "python": platform.python_version()}
    if against:
        facts["diffusers"] = version("diffusers")
    if arguments.json:
        print(json.dumps({"facts": facts, "microseconds": costs, "ratio to diffusers": against}, indent=2))
        return
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    print(f"{'':<28}{'µs a call':>10}{'over raw':>10}{'of diffusers':>14}")
    for name, cost in costs.items():
        over = "" if "entered" in name else f"{cost - costs['raw torch']:+.2f}"
        ratio = f"{against[name]:.2f} x" if name in against else ""
        print(f"{name:<28}{cost:>10.2f}{over:>10}{ratio:>14}")
    if not against:
        print("Install diffusers to compare with its dispatcher: pip install diffusers")
        return
    for name, goal in (("no setting", DISPATCH_GOAL), ("scope entered", SCOPE_GOAL)):
        print(f"goal for {name!r}: {goal} x diffusers: {'met' if against[name] <= goal else 'missed'}")


if __name__ == "__main__":
    main()
