"""Whether ``auto`` after tuning is as fast as the best backend, and what dispatch adds to a CUDA-graph replay.

    python benchmarks/tuned.py [--model baselines] [--skip flex] [--json out.json]

For every call of the model: tune, then time ``dispatch_attention_fn(backend="auto")`` in turns with every candidate called
directly. On CUDA also capture both the chosen backend and the dispatched call in a graph and time the replays. Tuning goes
to a store of its own; the file is written after every call. Exit code 1 if ``auto`` is more than 2 % slower than the best
single backend on any call.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

import torch

import attention_dispatch as ad
from attention_dispatch.call import spec_of
from attention_dispatch.registry import get
from attention_dispatch.tuning import shapes
from attention_dispatch.tuning.candidates import candidates, runner
from attention_dispatch.tuning.measure import captured, measure
from attention_dispatch.tuning.session import tuning

TOLERANCE = 0.02


def measure_shape(shape: shapes.Shape, device: torch.device, skip: set[str], budget_s: float) -> dict:
    call = shapes.inputs(shape, device)
    mask = call.mask.tensor if call.mask is not None else None
    if mask is not None and mask.ndim == 2:
        mask = mask[:, None, None]
    arguments = {"is_causal": shape.causal, "enable_gqa": call.enable_gqa}

    def auto():
        return ad.dispatch_attention_fn(call.query, call.key, call.value, mask, backend="auto", **arguments)

    with tuning(
        budget_s=budget_s, names=[b.name for b in candidates(spec_of(call), False) if b.name not in skip]
    ) as tuned:
        ad.dispatch_attention_fn(call.query, call.key, call.value, mask, **arguments)
    [found] = tuned.measurements
    spec = spec_of(call)
    # Those that were close while tuned; the others cannot be the best.
    close = [name for name in found.times if found.times[name].median_us < 1.3 * found.times[found.exact].median_us]
    ways = {name: runner(get(name), call, spec) for name in close}
    timings = measure({**ways, "auto": auto}, device, 2 * budget_s)
    best = min(close, key=lambda name: timings[name].median_us)
    row = {
        "call": str(shape),
        "choice": found.exact,
        "best": best,
        "static": found.static,
        "auto_us": timings["auto"].median_us,
        "best_us": timings[best].median_us,
        "auto_over_best": timings["auto"].median_us / timings[best].median_us,
        "tuned_us": {name: timing.median_us for name, timing in found.times.items()},
        "errors": found.errors,
        "rejected": found.rejected,
    }
    if device.type == "cuda":
        replays = measure({"direct": captured(ways[found.exact]), "dispatched": captured(auto)}, device, budget_s)
        row["graph_direct_us"] = replays["direct"].median_us
        row["graph_dispatched_us"] = replays["dispatched"].median_us
        row["graph_spread_us"] = max(timing.spread_us for timing in replays.values())
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="baselines", choices=list(shapes.MODELS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--skip", nargs="*", default=[], metavar="BACKEND")
    parser.add_argument("--budget", type=float, default=0.15, metavar="S", help="seconds per backend and call")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = torch.device(options.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        os.environ["ATTENTION_DISPATCH_CACHE"] = folder
        for shape in shapes.of_model(options.model).shapes:
            row = measure_shape(shape, device, set(options.skip), options.budget)
            rows.append(row)
            text = f"{row['call']:44} {row['choice']:16} auto {row['auto_us']:9.1f} us  best {row['best']:16} {row['best_us']:9.1f} us  {row['auto_over_best']:.3f}"
            if "graph_direct_us" in row:
                text += f"  graph: direct {row['graph_direct_us']:.1f}, dispatched {row['graph_dispatched_us']:.1f} us"
            print(text, flush=True)
            if options.json is not None:
                found = {"device": name, "torch": torch.__version__, "results": rows}
                options.json.write_text(json.dumps(found, indent=1))
    worst = max(row["auto_over_best"] for row in rows)
    print(f"{name}, torch {torch.__version__}: auto over best at worst {worst:.3f}, allowed {1 + TOLERANCE}")
    return int(worst > 1 + TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
