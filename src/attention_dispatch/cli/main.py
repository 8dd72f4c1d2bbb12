"""The entry point: parse, run one command, turn mistakes of the user into one line."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from . import bench, doctor, explain, tune
from . import list as list_command

_COMMANDS = {"list": list_command, "explain": explain, "doctor": doctor, "tune": tune, "bench": bench}

_EPILOG = """\
exit codes:
  0  done, nothing wrong
  1  something is wrong: a backend computes wrong results (doctor, bench), or the call is refused (explain)
  2  the command was used wrongly, or the program given to tune failed

examples:
  attention-dispatch list
  attention-dispatch explain --model flux --backend auto
  attention-dispatch doctor --quick
  attention-dispatch tune --model wan-480p
  attention-dispatch bench --seq 4096 --heads 24 --head-dim 128 -o report.html
"""


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    root = argparse.ArgumentParser(
        prog="attention-dispatch",
        description="Which attention kernels run here, which one a call gets and why, and which is fastest.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = root.add_subparsers(dest="command", required=True, metavar="command")
    for name, module in _COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=module.HELP,
            description=module.HELP,
            epilog=f"examples:\n{module.EXAMPLES}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.add_argument("--json", action="store_true", help="print JSON to standard output and nothing else")
        module.add_flags(sub)
        sub.set_defaults(run=module.run)
    return root


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    # What follows "--" is the command of another program, for tune.
    script: list[str] = []
    if "--" in given:
        split = given.index("--")
        given, script = given[:split], given[split + 1 :]
    options = parser().parse_args(given)
    options.script = script
    try:
        code = int(options.run(options))
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # The reader, such as `head`, has seen enough; Python must not flush into its pipe at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, RuntimeError) as error:
        print(f"attention-dispatch {options.command}: {error}", file=sys.stderr)
        return 2
