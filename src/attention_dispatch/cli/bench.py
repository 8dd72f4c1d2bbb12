"""``attention-dispatch bench``: every backend on the same calls, with errors beside speeds."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from .. import list_backends
from ..tuning import environment
from ..tuning.bench import Row, bench
from ..tuning.store import POLICIES
from . import calls, console, report

HELP = "measure all ready backends on given calls in one interleaved run: time, error, memory, first call"
EXAMPLES = """\
  attention-dispatch bench --model flux --model sdxl -o flux.json -o flux.html
  attention-dispatch bench --seq 4096 --heads 24 --head-dim 128 --causal --backends native,triton_flash
  attention-dispatch bench --model tiny --device cpu --baseline earlier.json"""

_HEADER = (
    "backend", "ms", "TFLOP/s", "x native", "rel. L2", "max error", "grad. L2", "peak MB", "first s", "lse", "grad", "state"
)  # fmt: skip


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of this command."""
    calls.add_flags(parser)
    parser.add_argument("--backends", help="names separated by commas; default: all that can run the call")
    parser.add_argument("--exact", action="store_true", help="leave 8-bit backends out")
    parser.add_argument("--policy", choices=POLICIES, default="eager")
    parser.add_argument("--budget", type=float, default=0.3, metavar="S", help="seconds per backend and call")
    parser.add_argument("--no-checks", action="store_true", help="skip the small LSE and gradient checks")
    parser.add_argument("--baseline", type=Path, metavar="FILE", help="JSON of an earlier run, to show the change")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="write .json, .csv, .png (needs matplotlib) or .html; may be given several times",
    )


def run(options: argparse.Namespace) -> int:
    """Measure, print and write; 1 if a backend returned a wrong result."""
    report.check_formats(options.output)
    wanted = calls.wanted(options)
    if not wanted:
        raise ValueError("say which call: --seq N, --model NAME or --shapes FILE.")
    names = options.backends.split(",") if options.backends else None
    unknown = [name for name in names or () if name not in list_backends()]
    if unknown:
        raise ValueError(f"unknown backend {', '.join(unknown)}. All names: attention-dispatch list.")
    earlier = _baseline(options.baseline)
    device = calls.device_of(options)
    rows: list[Row] = []
    with console.progress("measuring", len(wanted)) as advance:
        for shape in wanted:
            advance(str(shape))
            rows += bench(
                shape,
                device,
                names=names,
                quantised=not options.exact,
                budget_s=options.budget,
                policy=options.policy,
                check_small=not options.no_checks,
            )
    facts = [row._asdict() for row in rows]
    if options.baseline is not None:
        for row, fact in zip(rows, facts):
            fact["baseline_us"] = earlier.get((row.shape, row.backend))
    data = {"environment": environment.manifest(device.type), "rows": facts}
    if options.json:
        print(json.dumps(data, indent=2))
    else:
        for title in dict.fromkeys(row.shape for row in rows):
            console.table(
                _HEADER, [_cells(row, earlier) for row in rows if row.shape == title], f"\n{title} on {device}"
            )
    for file in options.output:
        report.write(file, data)
    return int(any(row.state == "wrong" for row in rows))


def _baseline(file: Path | None) -> dict[tuple[str, str], float]:
    if file is None:
        return {}
    try:
        rows: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["rows"]
        return {(row["shape"], row["backend"]): row["us"] for row in rows if row["us"]}
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{file} is not a JSON file that bench wrote ({error}).") from error


def _cells(row: Row, earlier: dict[tuple[str, str], float]) -> tuple[str, ...]:
    def number(value: float | None, pattern: str, factor: float = 1.0) -> str:
        return "" if value is None else format(value * factor, pattern)

    time = number(row.us, ".4g", 1e-3)
    before = earlier.get((row.shape, row.backend))
    if before and row.us:
        time += f" ({row.us / before - 1:+.1%})"
    return (
        row.backend,
        time,
        number(row.tflops, ".3g"),
        number(row.speedup, ".2f"),
        number(row.relative_l2, ".2g"),
        number(row.largest, ".2g"),
        number(row.gradient_l2, ".2g"),
        number(row.peak_bytes, ".1f", 1e-6),
        number(row.first_call_s, ".3g"),
        row.lse,
        row.grad,
        f"{row.state}: {row.what}" if row.what else row.state,
    )
