"""What a backend is: data and functions, and the registry row that says where they live."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from .call import AttentionCall, AttentionOutput, CallSpec
from .capabilities import Capabilities
from .errors import BackendUnavailableError, Reason, unavailable_message

_RESERVED = ("auto", "auto_quantized")


def _no_reasons() -> tuple[Reason, ...]:
    return ()


def _no_extra_reasons(spec: CallSpec) -> tuple[Reason, ...]:
    return ()


def _no_adapters(spec: CallSpec) -> tuple[str, ...]:
    return ()


def _nothing_to_load() -> None:
    return None


@dataclass(frozen=True)
class Backend:
    """One backend: data and functions. Define it at the top level of a module that imports no vendor package.

    Attributes:
        name: what users type.
        family: the file it lives in; backends of one family share code.
        capabilities: one row per group of devices.
        forward: computes a canonical call whose facts the capabilities allow.
        load: the only place where the vendor is imported. Called once, before the first ``forward``.
        probe: reasons why the package is missing, too old or on the wrong platform, found without importing it.
        backward: ``(grad_out, call, out, lse) -> (dq, dk, dv)`` given a global ``lse``; needed for ring attention only.
        with_lse: ``call -> names`` of backends that yield the LSE and compute what this one would, the likeliest first:
            a ring takes them for a backend that has no LSE of its own.
        extra_reasons: limits that exist only jointly.
        adapters: names in ``adapt.ADAPTERS`` of the conversions a call needs.
        bind: ``call -> function(query, key, value)`` or None: the shortest path for calls of one shape without a
            mask, for backends whose kernel checks its own arguments.
        kernel: which kernel will run a call, where the backend chooses between several.
        external: not part of torch: built elsewhere or compiled on this machine, so its first result is checked numerically.
        url: upstream.
        summary: one line for tables.
    """

    name: str
    family: str
    capabilities: tuple[Capabilities, ...]
    forward: Callable[[AttentionCall], AttentionOutput]
    load: Callable[[], None] = _nothing_to_load
    probe: Callable[[], tuple[Reason, ...]] = _no_reasons
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]] | None = None
    with_lse: Callable[[AttentionCall], tuple[str, ...]] | None = None
    extra_reasons: Callable[[CallSpec], tuple[Reason, ...]] = _no_extra_reasons
    adapters: Callable[[CallSpec], tuple[str, ...]] = _no_adapters
    bind: Callable[[AttentionCall], Callable[[Tensor, Tensor, Tensor], Tensor] | None] | None = None
    kernel: Callable[[AttentionCall], str] | None = None
    external: bool = False
    url: str = ""
    summary: str = ""

    @property
    def quantised(self) -> bool:
        return any(row.quantised for row in self.capabilities)


class Row(NamedTuple):
    """Registry row: ``"module:OBJECT"`` (or the object itself) and the command that installs what it needs."""

    target: str | Backend
    install: str = ""


def what_is_wrong(backend: Any, wanted: str | None = None) -> str:
    """One sentence about what keeps an object from being a backend; empty if nothing does.

    Args:
        backend: any object.
        wanted: the name under which it is registered, where its file was found by one.
    """
    if not isinstance(backend, Backend):
        return f"a backend is an attention_dispatch.Backend, got {backend!r}."
    name, rows = backend.name, backend.capabilities
    if not isinstance(name, str) or name != name.lower() or name in _RESERVED or not re.fullmatch(r"[^\s,]+", name):
        return (
            f"{name!r} cannot name a backend: use lower case, no spaces or commas, and none of {', '.join(_RESERVED)}."
        )
    if wanted not in (None, name):
        return f"the backend registered as {wanted!r} calls itself {name!r}: use one name."
    if not isinstance(rows, tuple) or not rows or not all(isinstance(row, Capabilities) for row in rows):
        return f"backend {name!r}: capabilities must be a tuple of Capabilities, got {type(rows).__name__}."
    return ""


def unusable(name: str, what: str, cause: Exception | None) -> Backend:
    """A stand-in for a backend whose file cannot be used: it declares nothing, and its status says why."""
    reasons = (Reason("import", what, f"update or remove the package that provides backend {name!r}."),)

    def refuse(*_: Any) -> Any:
        raise BackendUnavailableError(unavailable_message(name, reasons), reasons) from cause

    return Backend(name, "", (), forward=refuse, load=refuse, summary=what)
