"""``attention-dispatch tune``: measure, keep, show, exchange and clear choices."""

from __future__ import annotations

import argparse
import json
import runpy
import sys
import traceback
from pathlib import Path

import torch

from .. import dispatch_attention_fn, tuning
from ..masks import Mask
from ..tuning import shapes, store, tiles
from . import calls, console

HELP = "measure which backend is fastest for given calls and keep the result, which auto then follows"
EXAMPLES = """\
  attention-dispatch tune --model flux --model wan-480p
  attention-dispatch tune --shapes my_shapes.json --quantised
  attention-dispatch tune -- python my_script.py --steps 1     measures the calls the script dispatches
  attention-dispatch tune --show
  attention-dispatch tune --export here.json; attention-dispatch tune --import here.json"""


_KEPT = "what was measured before that is kept."


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of this command."""
    calls.add_flags(parser)
    parser.add_argument("--quantised", action="store_true", help="also measure 8-bit backends, for auto_quantized")
    parser.add_argument("--tiles", action="store_true", help="also measure tile shapes of triton_flash and triton_sage")
    parser.add_argument("--again", action="store_true", help="measure what is in the store already")
    parser.add_argument("--policy", choices=store.POLICIES, default="eager")
    parser.add_argument("--budget", type=float, default=0.2, metavar="S", help="seconds per backend and call")
    stored = parser.add_mutually_exclusive_group()
    stored.add_argument("--show", action="store_true", help="print what is stored")
    stored.add_argument("--export", type=Path, metavar="FILE")
    stored.add_argument("--import", dest="adopt", type=Path, metavar="FILE")
    stored.add_argument("--clear", action="store_true", help="delete all stored measurements and verdicts")


def run(options: argparse.Namespace) -> int:
    """Do one of these; 0 if it was done."""
    device = calls.device_of(options)
    if options.show:
        return _show(options, device.type)
    if options.export:
        options.export.write_text(json.dumps(store.export(device.type), indent=1, sort_keys=True), encoding="utf-8")
        count = len(store.entries(device.type)) + len(store.tiles(device.type))
        return _done(options, {"measurements": count, "file": str(options.export)}, f"{count} measurements written")
    if options.adopt:
        count = store.adopt(json.loads(options.adopt.read_text(encoding="utf-8")))
        return _done(options, {"measurements": count, "file": str(options.adopt)}, f"{count} measurements taken over")
    if options.clear:
        deleted = [str(file) for file in store.clear()]
        return _done(options, {"deleted": deleted}, "\n".join(f"deleted {file}" for file in deleted))
    wanted = calls.wanted(options)
    if not wanted and not options.script:
        raise ValueError("say what to measure: --model NAME, --shapes FILE, --seq N, or -- python script.py.")
    scope = tuning(
        quantised=options.quantised,
        again=options.again,
        policy=options.policy,
        budget_s=options.budget,
        tiles=options.tiles,
    )
    with scope:
        with console.progress("measuring", len(wanted)) as advance:
            for shape in wanted:
                advance(str(shape))
                _run_shape(shape, device)
        if options.script:
            _run_script(options.script)
    _report(options, scope, device.type)
    return 0


def _done(options: argparse.Namespace, data: dict[str, object], text: str) -> int:
    if options.json:
        print(json.dumps(data, indent=2))
    else:
        print(text, file=sys.stderr)
    return 0


def _run_shape(shape: shapes.Shape, device: torch.device) -> None:
    call = shapes.inputs(shape, device)
    mask = call.mask
    argument = None
    if isinstance(mask, Mask) and mask.tensor is not None:
        argument = mask.tensor[:, None, None] if mask.kind == "key_padding" else mask.tensor
    with torch.set_grad_enabled(shape.grad):
        dispatch_attention_fn(
            call.query, call.key, call.value, argument, is_causal=shape.causal, enable_gqa=call.enable_gqa
        )


def _run_script(command: list[str]) -> None:
    """Run ``[python] script.py arguments`` or ``[python] -m module arguments`` in this process.

    Raises:
        RuntimeError: it failed; its traceback is printed.
    """
    if Path(command[0]).name.startswith("python"):
        command = command[1:]
    if not command:
        raise ValueError("after -- comes a script: attention-dispatch tune -- python script.py.")
    before = sys.argv, sys.path[0]
    try:
        if command[0] == "-m":
            sys.argv = command[1:]
            sys.path[0] = ""
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = command
            sys.path[0] = str(Path(command[0]).resolve().parent)
            runpy.run_path(command[0], run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise RuntimeError(f"{' '.join(command)} ended with code {end.code}; {_KEPT}") from end
    except Exception as error:  # whatever the program of the user raises is its own affair
        traceback.print_exc()
        raise RuntimeError(f"{' '.join(command)} raised {type(error).__name__}; {_KEPT}") from error
    finally:
        sys.argv, sys.path[0] = before


def _report(options: argparse.Namespace, scope: tuning, device: str) -> None:
    if options.json:
        entries = store.entries(device)
        measured = {found.key: entries.get(found.key) for found in scope.measurements}
        shapes_of_tiles = {str(found.key): tiles.as_entry(found) for found in scope.tiles}
        print(json.dumps({**measured, **shapes_of_tiles}, indent=2))
        return
    print(scope)
    if options.tiles and not scope.tiles:
        print(
            "No tile was measured: no Triton kernel with tiles to choose ran these calls (see attention-dispatch list), or "
            "theirs are stored already (--again); 8-bit kernels need --quantised.",
            file=sys.stderr,
        )
    if scope.measurements or scope.tiles:
        print(f"\nstored in {store.path(device)}", file=sys.stderr)
    elif options.script:
        print(
            "The script dispatched no new kind of attention call. Route its model: "
            "attention_dispatch.set_attention_backend(model, 'auto'); or measure again: --again.",
            file=sys.stderr,
        )


def _show(options: argparse.Namespace, device: str) -> int:
    if options.json:
        print(json.dumps(store.export(device), indent=2, sort_keys=True))
        return 0
    print(f"{store.path(device)}\n")
    rows = []
    for key, entry in store.entries(device).items():
        times = sorted(entry["times_us"].items(), key=lambda item: item[1])
        rows.append(
            (
                entry["exact"],
                entry.get("quantised") or "",
                f"{entry['times_us'].get(entry['static'], 0) / max(times[0][1], 1e-9):.2f}",
                entry.get("measured", ""),
                key,
            )
        )
    console.table(("auto", "auto_quantized", "x static", "measured", "call"), rows)
    stored = store.tiles(device)
    if stored:
        print()
        console.table(
            ("tile of", "tile", "us", "us before", "measured"),
            [(key, tiles.in_words(e["tile"]), str(e.get("us", "")), str(e.get("before_us", "")), e.get("measured", ""))
             for key, e in sorted(stored.items())],
        )  # fmt: skip
    verdicts = store.verdicts(device)
    if verdicts:
        print()
        console.table(
            ("backend", "verdict", "date", "what"),
            [(name, v["state"], v.get("date", ""), v.get("what", "")) for name, v in sorted(verdicts.items())],
        )
    return 0
