"""``attention-dispatch explain``: which backend a call gets, why, and why not each other one."""

from __future__ import annotations

import argparse
import json
from typing import Any

from .. import explain
from . import calls

HELP = "say which backend would run a call, why, why not each other one, and what would change that"
EXAMPLES = """\
  attention-dispatch explain --model flux
  attention-dispatch explain --seq 4096 --mask key_padding --grad --backend _flash_3,flash,native
  attention-dispatch explain --seq 4096 --deterministic --json"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of this command."""
    calls.add_flags(parser)
    parser.add_argument("--backend", default="auto", help="a name, names separated by commas, auto or auto_quantized")
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--return-lse", action="store_true")
    parser.add_argument("--window", type=int, nargs=2, metavar=("LEFT", "RIGHT"))
    parser.add_argument("--softcap", type=float)
    parser.add_argument("--dropout", type=float, default=0.0)


def run(options: argparse.Namespace) -> int:
    """Print one decision per call; 1 if a call would be refused."""
    wanted = calls.wanted(options)
    if not wanted:
        raise ValueError("say which call: --seq N, --model NAME or --shapes FILE.")
    device = calls.device_of(options)
    names = options.backend.split(",")
    keywords = {
        name: value
        for name, value in (
            ("deterministic", options.deterministic),
            ("return_lse", options.return_lse),
            ("window_size", tuple(options.window) if options.window else None),
            ("softcap", options.softcap),
        )
        if value
    }
    common: dict[str, Any] = {
        "dropout_p": options.dropout,
        "attention_kwargs": keywords or None,
        "backend": names if len(names) > 1 else names[0],
        "device": device,
    }
    decisions = []
    for shape in wanted:
        decisions.append(explain(**calls.arguments(shape, device), **common))
    if options.json:
        print(json.dumps([json.loads(decision.to_json()) for decision in decisions], indent=2))
    else:
        print("\n\n".join(map(str, decisions)))
    return int(any(decision.backend is None for decision in decisions))
