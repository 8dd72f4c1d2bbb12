"""``attention-dispatch doctor``: what is installed, what works, and what computes wrong results."""

from __future__ import annotations

import argparse
import json

from .. import list_backends
from ..registry import get
from ..tuning import environment, health, store
from . import calls, console

HELP = "check every backend on this machine: ready or why not, then small calls against float64 in a child process"
EXAMPLES = """\
  attention-dispatch doctor                  a selection of cases
  attention-dispatch doctor --full flex      every case, one backend
  attention-dispatch doctor --import my_package.backend my_backend"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of this command."""
    parser.add_argument("names", nargs="*", metavar="BACKEND", help="default: all that are ready")
    parser.add_argument("--device", help="default: the accelerator of this machine, else cpu")
    depth = parser.add_mutually_exclusive_group()
    depth.add_argument("--quick", action="store_true", help="a selection of cases (the default)")
    depth.add_argument("--full", action="store_true", help="all cases of the conformance suite")
    parser.add_argument("--timeout", type=float, default=health.TIMEOUT_S, help="seconds after which a case hangs")
    parser.add_argument("--import", dest="imports", action="append", default=[], metavar="MODULE")
    parser.add_argument("--no-save", action="store_true", help="do not keep the verdicts, which auto heeds")


def run(options: argparse.Namespace) -> int:
    """Print; 1 if a backend that is ready is not right."""
    device = calls.device_of(options).type
    wanted, absent = [], {}
    for name in options.names or list_backends():
        if name not in list_backends():
            if not options.imports:
                get(name)
            # Registered by an import in the child process only.
            wanted.append(name)
            continue
        # Asked of metadata: an import may end its process, and is left to the child.
        reasons = get(name).probe()
        if reasons:
            absent[name] = "; ".join(f"{reason.what} -> {reason.fix}" for reason in reasons)
        elif any(device in row.devices for row in get(name).capabilities):
            wanted.append(name)
        else:
            devices = ", ".join(dict.fromkeys(other for row in get(name).capabilities for other in row.devices))
            absent[name] = f"it runs on {devices}, not on {device} -> check it there: --device"
    with console.progress("checking", len(wanted)) as advance:

        def checked(result: health.Health) -> None:
            # At once, so that whoever stops this command keeps what was found.
            if not options.no_save:
                health.remember([result], device)
            advance(result.backend)

        found = health.check(
            wanted,
            device,
            quick=not options.full,
            timeout_s=options.timeout,
            imports=options.imports,
            progress=checked,
        )
    absent |= {result.backend: result.what for result in found if result.state == "absent"}
    found = [result for result in found if result.state != "absent"]
    bad = [result for result in found if result.state not in health.HARMLESS]
    if options.json:
        data = {
            "environment": environment.manifest(device),
            "device": device,
            "checked": [result._asdict() for result in found],
            "not_ready": absent,
        }
        print(json.dumps(data, indent=2))
        return int(bool(bad))
    for name, value in environment.manifest(device).items():
        print(f"{name:20} {value}")
    print()
    rows = [(result.backend, result.state, str(result.computed), str(result.refused), result.what) for result in found]
    rows += [(name, "not ready", "", "", why) for name, why in absent.items()]
    console.table(("backend", "state", "right", "refused", "what"), rows)
    for result in bad:
        print(f"\n{result.backend!r} is {result.state}: reinstall its package for this torch and GPU. auto avoids it.")
    if not options.no_save:
        print(f"\nverdicts: {store.path(device)}")
    return int(bool(bad))
