"""The table of what every backend supports, written from their declared capabilities.

Written to docs/backends.md by ``attention-dispatch list --markdown``.
"""

from __future__ import annotations

from . import registry
from .capabilities import Capabilities
from .registry import Backend

_HEADER = """# What every backend supports

Generated from the declared capabilities: `make docs`. One row per backend and group of devices. "yes" means computed
exactly; anything else is refused with a reason before the kernel runs.

| backend | devices | dtypes | head dims | masks | causal | window | softcap | dropout | GQA | Dv ≠ D | gradients | LSE | deterministic |
|---|---|---|---|---|---|---|---|---|---|---|---|---|---|
"""


def support_table() -> str:
    """Markdown of all registered backends; imports no vendor package."""
    lines = [_row(registry.get(name), row) for name in registry.names() for row in registry.get(name).capabilities]
    sources = [
        f"- `{backend.name}`: {backend.summary}{_link(backend)}" for backend in map(registry.get, registry.names())
    ]
    return _HEADER + "\n".join(lines) + "\n\n" + "\n".join(sources) + "\n"


def _row(backend: Backend, row: Capabilities) -> str:
    cells = [
        f"`{backend.name}`" + (" (8-bit)" if row.quantised else ""),
        _devices(row),
        ", ".join(str(dtype).removeprefix("torch.") for dtype in row.dtypes),
        _head_dims(row),
        ", ".join(sorted(row.masks)) or "no",
        _lengths(row.causal),
        _lengths(row.window),
        *(_yes(on) for on in (row.softcap, row.dropout, row.gqa, row.head_dim_v, row.gradients, row.lse)),
        {"always": "yes", "forward": "forward", "never": "no"}[row.deterministic],
    ]
    return "| " + " | ".join(cells) + " |"


def _devices(row: Capabilities) -> str:
    where = ", ".join(row.devices)
    if row.architectures:
        return f"{where} ({', '.join(row.architectures)})"
    return f"{where} (sm_{row.min_sm}+)" if row.min_sm else where


def _head_dims(row: Capabilities) -> str:
    if row.head_dims:
        return ", ".join(map(str, row.head_dims))
    largest = "any" if row.max_head_dim > 4096 else f"≤ {row.max_head_dim}"
    return largest if row.head_dim_multiple == 1 else f"{largest}, multiple of {row.head_dim_multiple}"


def _lengths(served: str) -> str:
    return {"none": "no", "equal": "Q = K", "fewer_queries": "Q ≤ K", "any": "yes"}[served]


def _yes(on: bool) -> str:
    return "yes" if on else "no"


def _link(backend: Backend) -> str:
    return f" ([upstream]({backend.url}))" if backend.url else ""
