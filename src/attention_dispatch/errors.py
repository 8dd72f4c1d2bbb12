"""The exceptions, the reasons they carry, and the one template that turns both into text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

__all__ = [
    "AttentionDispatchError",
    "BackendRejectedError",
    "BackendUnavailableError",
    "InvalidCallError",
    "NoBackendError",
    "Reason",
    "UnknownBackendError",
]


class Reason(NamedTuple):
    """Why a backend cannot serve a call, or is not available.

    Attributes:
        code: stable identifier for programs and tests, such as ``"mask"`` or ``"package"``.
        what: one sentence for people.
        fix: what to type or change.
    """

    code: str
    what: str
    fix: str

    def __str__(self) -> str:
        return f"{self.what} [{self.code}]"


class AttentionDispatchError(Exception):
    """Base class of every error this library raises on purpose."""


class InvalidCallError(AttentionDispatchError, ValueError):
    """The call itself is wrong (shapes, dtypes, devices, option names), whichever backend is set."""


class UnknownBackendError(AttentionDispatchError, ValueError):
    """A name that no backend is registered under. The message lists the nearest names."""


class _ReasonedError(AttentionDispatchError):
    def __init__(self, message: str, reasons: Sequence[Reason] = ()):
        super().__init__(message)
        self.reasons = tuple(reasons)

    @property
    def codes(self) -> tuple[str, ...]:
        return tuple(reason.code for reason in self.reasons)


class BackendUnavailableError(_ReasonedError, ImportError):
    """The backend's package is missing, too old, or fails to import. The caught exception is chained."""


class BackendRejectedError(_ReasonedError, NotImplementedError):
    """The backend asked for by name is there but cannot run this call exactly."""


class NoBackendError(_ReasonedError, RuntimeError):
    """No backend of an ordered permission, or none at all for ``"auto"``, can run this call."""


def rejected_message(name: str, call: str, reasons: Iterable[Reason], alternatives: Sequence[str]) -> str:
    """Text of a :class:`BackendRejectedError`."""
    reasons = list(reasons)
    lines = [f"backend {name!r} cannot run this call.", f"  Call:  {call}"]
    lines += _labelled("Why:", [str(reason) for reason in reasons])
    fixes = list(dict.fromkeys(reason.fix for reason in reasons))
    if alternatives:
        fixes.append(f"backend={alternatives[0]!r} runs this call as it is.")
    fixes.append("All reasons: attention_dispatch.explain(...) with the same arguments.")
    return "\n".join(lines + _labelled("Do:", fixes))


def unavailable_message(name: str, reasons: Iterable[Reason]) -> str:
    """Text of a :class:`BackendUnavailableError`."""
    reasons = list(reasons)
    lines = [f"backend {name!r} is not available on this machine."]
    lines += _labelled("Why:", [str(reason) for reason in reasons])
    fixes = list(dict.fromkeys(reason.fix for reason in reasons))
    return "\n".join(lines + _labelled("Do:", fixes))


def none_left_message(request: str, call: str, refusals: Mapping[str, Sequence[Reason]]) -> str:
    """Text of a :class:`NoBackendError`; backends with identical causes share a line."""
    grouped: dict[tuple[str, ...], list[str]] = {}
    for name, reasons in refusals.items():
        grouped.setdefault(tuple(str(reason) for reason in reasons), []).append(name)
    why = [f"{', '.join(names)}: {'; '.join(texts)}" for texts, names in grouped.items()]
    fixes = list(dict.fromkeys(reason.fix for reasons in refusals.values() for reason in reasons))
    lines = [f"no backend of {request} can run this call.", f"  Call:  {call}"]
    return "\n".join(lines + _labelled("Why:", why) + _labelled("Do:", fixes[:6]))


def _labelled(label: str, texts: Sequence[str]) -> list[str]:
    return [f"  {label if index == 0 else '':<5}  {text}" for index, text in enumerate(texts)]
