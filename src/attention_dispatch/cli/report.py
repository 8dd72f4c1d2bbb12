"""Results of bench as files: JSON, CSV, a PNG plot, and one HTML page that needs nothing else."""

from __future__ import annotations

import csv
import html
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Data = dict[str, Any]

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; margin: 0.5rem 0 2rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 0.25rem 0.6rem; border-bottom: 1px solid #8884; }
th:first-child, td:first-child, td.bar { text-align: left; }
td.bar { width: 30%; }
td.bar span { display: inline-block; height: 0.8em; background: #3b82c4; border-radius: 2px; }
tr.wrong td { color: #c0392b; }
dl { display: grid; grid-template-columns: max-content auto; gap: 0 1rem; font-size: 0.9em; }
dd { margin: 0; }
"""
_COLUMNS: tuple[tuple[str, str, str, float], ...] = (
    ("ms", "us", ".4g", 1e-3),
    ("TFLOP/s", "tflops", ".3g", 1.0),
    ("× native", "speedup", ".2f", 1.0),
    ("rel. L2", "relative_l2", ".2g", 1.0),
    ("max error", "largest", ".2g", 1.0),
    ("grad. L2", "gradient_l2", ".2g", 1.0),
    ("peak MB", "peak_bytes", ".1f", 1e-6),
    ("first call s", "first_call_s", ".3g", 1.0),
)


def check_formats(files: Sequence[Path]) -> None:
    """Before anything is measured, raise for a file that could not be written afterwards.

    Raises:
        ValueError: an unknown suffix, or a plot without matplotlib.
    """
    for file in files:
        if file.suffix not in _WRITERS:
            raise ValueError(f"{file}: the suffix must be one of {', '.join(_WRITERS)}.")
        if file.suffix == ".png":
            try:
                import matplotlib  # noqa: F401
            except ImportError as error:
                raise ValueError(f"{file} needs matplotlib: pip install 'attention-dispatch[cli]'.") from error


def write(file: Path, data: Data) -> None:
    """Write results in the format of the suffix."""
    file.parent.mkdir(parents=True, exist_ok=True)
    _WRITERS[file.suffix](file, data)


def _json(file: Path, data: Data) -> None:
    file.write_text(json.dumps(data, indent=1), encoding="utf-8")


def _csv(file: Path, data: Data) -> None:
    with open(file, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(data["rows"][0]))
        writer.writeheader()
        writer.writerows(data["rows"])


def _by_shape(data: Data) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in data["rows"]:
        found.setdefault(row["shape"], []).append(row)
    return found


def _png(file: Path, data: Data) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = {shape: [row for row in rows if row["tflops"] is not None] for shape, rows in _by_shape(data).items()}
    groups = {shape: rows for shape, rows in groups.items() if rows}
    bars = sum(len(rows) + 2 for rows in groups.values())
    figure, axes = pyplot.subplots(
        len(groups),
        1,
        figsize=(9, 0.3 * bars + 1),
        squeeze=False,
        gridspec_kw={"height_ratios": [len(rows) + 1 for rows in groups.values()]},
    )
    for axis, (shape, rows) in zip(axes[:, 0], groups.items()):
        names = [row["backend"] for row in rows][::-1]
        values = [row["tflops"] for row in rows][::-1]
        drawn = axis.barh(names, values, color=["#3b82c4" if name != "native" else "#8a8f98" for name in names])
        axis.bar_label(drawn, fmt="%.3g", padding=3, fontsize=8)
        axis.set_title(shape, loc="left", fontsize=9)
        axis.set_xlabel("TFLOP/s", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


def _html(file: Path, data: Data) -> None:
    facts = "".join(
        f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in data["environment"].items()
    )
    sections = "".join(_section(shape, rows) for shape, rows in _by_shape(data).items())
    page = (
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>Attention backends</title>"
        f"<style>{_STYLE}</style></head><body><h1>Attention backends</h1><dl>{facts}</dl>{sections}"
        f"<p>Times are medians of interleaved samples. Errors are against float64 on sampled rows. A wrong result gets no "
        f"speed.</p></body></html>"
    )
    file.write_text(page, encoding="utf-8")


def _section(shape: str, rows: list[dict[str, Any]]) -> str:
    compared = any(row.get("baseline_us") for row in rows)
    heads = "".join(f"<th>{name}</th>" for name, *_ in _COLUMNS) + ("<th>change</th>" if compared else "")
    fastest = max((row["speedup"] or 0.0 for row in rows), default=0.0)
    body = ""
    for row in rows:
        cells = "".join(
            f"<td>{'' if row[field] is None else format(row[field] * factor, pattern)}</td>"
            for _, field, pattern, factor in _COLUMNS
        )
        if compared:
            before, now = row.get("baseline_us"), row["us"]
            cells += f"<td>{format(now / before - 1, '+.1%') if before and now else ''}</td>"
        width = 100.0 * (row["speedup"] or 0.0) / fastest if fastest else 0.0
        state = row["state"] + (f": {row['what']}" if row["what"] else "")
        body += (
            f"<tr class='{row['state']}'><td>{html.escape(row['backend'])}</td>"
            f"<td class='bar'><span style='width:{width:.0f}%'></span></td>{cells}"
            f"<td>{row['lse']}</td><td>{row['grad']}</td><td>{html.escape(state)}</td></tr>"
        )
    return (
        f"<h2>{html.escape(shape)}</h2><table><tr><th>backend</th><th></th>{heads}<th>LSE</th><th>gradients</th>"
        f"<th>state</th></tr>{body}</table>"
    )


_WRITERS: dict[str, Callable[[Path, Data], None]] = {".json": _json, ".csv": _csv, ".png": _png, ".html": _html}
