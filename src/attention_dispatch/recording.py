"""What really ran: calls recorded per module."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .call import AttentionCall, CallSpec, describe
from .graphs import traced_choices
from .module_name import module_name
from .numerics import Check, can_compare, compare, finiteness
from .request import Request, current
from .resolve import Plan


class Record:
    """One kind of call of one module.

    Attributes:
        module: name in the model; the class where it has none; empty outside of modules.
        backend: what ran it. request: what was asked for. call: in words. count: how often. mask: its kind.
        refused: backend -> why not, where the request was a permission.
        check: the comparison with exact attention, if asked for; calls with context parallelism have none.
    """

    def __init__(
        self,
        module: str,
        backend: str,
        request: str,
        call: str,
        mask: str,
        query_shape: tuple[int, ...],
        key_shape: tuple[int, ...],
        refused: dict[str, str],
    ):
        self.module = module
        self.backend = backend
        self.request = request
        self.call = call
        self.mask = mask
        self.query_shape = query_shape
        self.key_shape = key_shape
        self.count = 0
        self.refused = refused
        self.check: Check | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        data = dict(vars(self))
        data["check"] = None if self.check is None else {**self.check._asdict(), "ok": self.check.ok}
        return data


class Calls:
    """The calls recorded in a ``with record():`` scope.

    Attributes:
        records: one :class:`Record` per module and kind of call, in order of their first call.
        compiled: kinds of calls that were traced into compiled graphs by this process so far, with their backend.
            A compiled graph runs without this library, so neither modules nor counts are known.
    """

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.compiled: list[tuple[str, str]] = []
        self._by_key: dict[Any, Record] = {}

    def _take(self, key: Any, make: Callable[[], Record]) -> Record:
        """The record of a kind of call, one call further."""
        found = self._by_key.get(key)
        if found is None:
            found = self._by_key[key] = make()
            self.records.append(found)
        found.count += 1
        return found

    def backends(self) -> dict[str, int]:
        """Number of calls by backend."""
        counts: dict[str, int] = {}
        for record in self.records:
            counts[record.backend] = counts.get(record.backend, 0) + record.count
        return counts

    def first_not_finite(self) -> Record | None:
        """The first module with finite inputs whose output was NaN or infinite; needs ``compare``."""
        for record in self.records:
            if record.check is not None and record.check.finite_inputs and not record.check.finite:
                return record
        return None

    def table(self) -> str:
        """Readable text: one line per module and kind of call."""
        rows = [("module", "backend", "count", "q", "k", "mask", "asked for", "error")]
        for record in self.records:
            rows.append(
                (
                    record.module or "(no module)",
                    record.backend,
                    str(record.count),
                    "x".join(map(str, record.query_shape)),
                    "x".join(map(str, record.key_shape)),
                    record.mask,
                    record.request,
                    _error_text(record.check),
                )
            )
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
        for record in self.records:
            lines += [f"  {record.module or '(no module)'}: not {name}: {why}" for name, why in record.refused.items()]
        broken = self.first_not_finite()
        if broken is not None:
            lines.append(f"The first output that is not finite came from {broken.module!r} on {broken.backend!r}.")
        lines += [f"compiled: {backend}: {spec}" for spec, backend in self.compiled]
        return "\n".join(lines)

    def to_json(self) -> str:
        """All records as JSON."""
        compiled = [{"call": spec, "backend": backend} for spec, backend in self.compiled]
        return json.dumps({"calls": [record.as_dict() for record in self.records], "compiled": compiled}, indent=2)

    def __str__(self) -> str:
        return self.table()


def _error_text(check: Check | None) -> str:
    if check is None:
        return ""
    if not check.finite:
        return "not finite" if check.finite_inputs else "not finite, nor were its inputs"
    if math.isnan(check.relative_l2):
        return "finite"
    return f"{check.relative_l2:.2g}" + ("" if check.ok else f" (allowed {check.allowed:.2g})")


class record:  # lower case: it is used like a function
    """Scope in which every attention call of this thread is recorded: which module, which backend, how often, why.

    Costs nothing when not used. Calls inside compiled graphs run without this library; of these the kinds of call and
    their backends are listed (``calls.compiled``), without modules and counts.

    Args:
        compare: ``"reference"`` also compares the first of each distinct kind of call of each module with exact
            attention (float64, on sampled rows), and finds the first module whose output is not finite.

    Raises:
        ValueError: another value of ``compare``.

    Example:
        >>> import torch, attention_dispatch as ad
        >>> layer = torch.nn.TransformerEncoderLayer(32, 4, batch_first=True)
        >>> _ = ad.set_attention_backend(layer, ["flash", "native"])
        >>> with ad.record() as calls:
        ...     _ = layer(torch.randn(1, 8, 32))
        >>> [(call.module, call.backend, call.count) for call in calls.records]
        [('self_attn', 'native', 1)]
        >>> ad.reset_attention_backend(layer)
    """

    def __init__(self, compare: str | None = None):
        if compare not in (None, "reference"):
            raise ValueError(f"compare must be 'reference' or None, got {compare!r}.")
        self.compare = compare
        self.calls = Calls()

    def __enter__(self) -> Calls:
        state = current.state
        self._outer = state.observer
        state.observer = self._observe
        state.refresh()
        _scopes.open.append(self.calls)
        return self.calls

    def __exit__(self, *exception: object) -> None:
        state = current.state
        state.observer = self._outer
        state.refresh()
        _scopes.open.remove(self.calls)
        self.calls.compiled = [(_spec_text(spec), backend) for (_request, spec), backend in traced_choices.items()]

    def _observe(self, call: AttentionCall, spec: CallSpec, request: Request, plan: Plan, output: Any) -> Any:
        module = module_name()
        key = (module, spec, request, plan.backend.name, call.query.shape, call.key.shape)

        def make() -> Record:
            refused = {
                verdict.name: "; ".join(reason.what for reason in verdict.reasons)
                for verdict in plan.verdicts
                if verdict.reasons
            }
            shapes = tuple(call.query.shape), tuple(call.key.shape)
            return Record(
                module, plan.backend.name, str(request), describe(call, spec), spec.mask, *shapes, refused=refused
            )

        found = self.calls._take(key, make)
        if self.compare is not None and can_compare(spec) and (found.check is None or found.check.finite):
            found.check = (
                compare(call, spec, plan, output) if found.check is None else finiteness(found.check, call, output)
            )
        return output if self._outer is None else self._outer(call, spec, request, plan, output)


class _Scopes(threading.local):
    def __init__(self) -> None:
        self.open: list[Calls] = []


_scopes = _Scopes()


def recording() -> bool:
    """Whether a ``with record():`` scope is open in this thread."""
    return bool(_scopes.open)


def record_parallel(query: Tensor, key: Tensor, mask: Any, request: str, backend: str, place: str) -> None:
    """Note a call with context parallelism in every open scope of this thread.

    Args:
        query, key: this rank's shards. mask: as given.
        request: what was asked for. backend: what computes its blocks. place: this rank's, in words.
    """
    module = module_name()
    shapes = tuple(query.shape), tuple(key.shape)
    kind = "none" if mask is None else ("bool" if mask.dtype == torch.bool else "bias")
    words = f"q {shapes[0]} {str(query.dtype).removeprefix('torch.')} on {query.device.type}, k {shapes[1]}; {place}"
    for calls in _scopes.open:
        calls._take(
            (module, words, kind, request, backend),
            lambda: Record(module, backend, request, words, kind, *shapes, refused={}),
        )


def _spec_text(spec: CallSpec) -> str:
    flags = [name for name in ("is_causal", "window", "softcap", "dropout", "grad", "lse") if getattr(spec, name)]
    text = f"{spec.heads} heads of {spec.head_dim}, {str(spec.dtype).removeprefix('torch.')} on {spec.device}"
    return ", ".join([text, f"mask {spec.mask}", *flags])
