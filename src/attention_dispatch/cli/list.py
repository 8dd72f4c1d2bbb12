"""``attention-dispatch list``: the backends and what each supports on this machine."""

from __future__ import annotations

import argparse
import json

from .. import backend_status, list_backends
from ..registry import get
from ..support_table import support_table
from . import console

HELP = "list the backends and whether each is ready on this machine"
EXAMPLES = """\
  attention-dispatch list
  attention-dispatch list --json
  attention-dispatch list --markdown > docs/backends.md"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of this command."""
    parser.add_argument("--markdown", action="store_true", help="print what every backend supports on any machine")


def run(options: argparse.Namespace) -> int:
    """Print; always 0."""
    if options.markdown:
        print(support_table(), end="")
        return 0
    rows = []
    for name in list_backends():
        backend, status = get(name), backend_status(name)
        serves = sorted(
            {
                word
                for row in backend.capabilities
                for word, on in (
                    ("causal", row.causal != "none"),
                    ("masks", bool(row.masks)),
                    ("window", row.window != "none"),
                    ("softcap", row.softcap),
                    ("gradients", row.gradients),
                    ("lse", row.lse),
                    ("gqa", row.gqa),
                )
                if on
            }
        )
        rows.append(
            {
                "backend": name,
                "ready": status.available,
                "quantised": backend.quantised,
                "serves": serves,
                "summary": backend.summary,
                "reasons": [reason._asdict() for reason in status.reasons],
            }
        )
    if options.json:
        print(json.dumps(rows, indent=2))
        return 0
    console.table(
        ("backend", "status", "8-bit", "serves", "about, or what to do"),
        [
            (
                str(row["backend"]),
                "ready" if row["ready"] else "not ready",
                "yes" if row["quantised"] else "",
                " ".join(row["serves"]),  # type: ignore[arg-type]
                str(row["summary"])
                if row["ready"]
                else "; ".join(f"{r['what']} -> {r['fix']}" for r in row["reasons"]),  # type: ignore[attr-defined]
            )
            for row in sorted(rows, key=lambda row: not row["ready"])
        ],
    )
    return 0
