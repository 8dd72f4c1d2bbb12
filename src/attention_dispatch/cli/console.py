"""Text for people: tables, progress and colours, with rich where it is installed and on a terminal; plain elsewhere."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence

_RICH = importlib.util.find_spec("rich") is not None


def table(header: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
    """Print a table to standard output."""
    if _RICH and sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        view = Table(title=title or None, title_justify="left", header_style="bold")
        for name in header:
            view.add_column(name, overflow="fold")
        for row in rows:
            view.add_row(*(Text(cell, style=_style(cell)) for cell in row))
        Console().print(view)
        return
    if title:
        print(title)
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    # The last column is text of any length.
    widths[-1] = 0
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())


def _style(cell: str) -> str:
    word = cell.partition(":")[0]
    if word in ("ok", "ready"):
        return "green"
    return "red" if word in ("wrong", "crashed", "hung", "failed") else ""


@contextlib.contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[str], None]]:
    """A bar on standard error while it is a terminal; the value is called with a word before each step."""
    if not sys.stderr.isatty():
        yield lambda step: None
        return
    if _RICH:
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(title, total=total)

            def advance(step: str) -> None:
                bar.update(task, description=f"{title}: {step}")
                bar.advance(task)

            yield advance
        return
    done = 0

    def write(step: str) -> None:
        nonlocal done
        done += 1
        print(f"\r{title} {done}/{total}: {step:<40}", end="", file=sys.stderr, flush=True)

    yield write
    print("\r" + " " * 70 + "\r", end="", file=sys.stderr)
