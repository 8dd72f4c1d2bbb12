"""The answer to "which backend, why, and why not that one", as data with a readable text."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

import torch

from . import adapt, preference, registry
from .call import AttentionCall, CallSpec, architecture, describe, spec_of
from .errors import BackendRejectedError, BackendUnavailableError, NoBackendError, Reason
from .request import Request
from .resolve import Verdict, plan_for, verdict_on


@dataclass(frozen=True)
class Copy:
    """A conversion that writes memory before the kernel runs."""

    adapter: str
    what: str
    bytes: int


@dataclass(frozen=True)
class Decision:
    """What would happen to a call.

    Attributes:
        request: what was asked for.
        call: the call in words.
        spec: its facts.
        backend: name of the backend that runs it; None if it is refused.
        kernel: the kernel that the backend picks, where it chooses between several.
        copies: conversions before the kernel, with their bytes.
        verdicts: every registered backend, the chosen one first, with its reasons.
        measured: what the order of preference rests on.
        error: text of the error that the call would raise, if any.
    """

    request: str
    call: str
    spec: CallSpec
    backend: str | None
    kernel: str | None
    copies: tuple[Copy, ...]
    verdicts: tuple[Verdict, ...]
    measured: str
    error: str | None = None

    def why_not(self, name: str) -> tuple[Reason, ...]:
        """The reasons against a backend; empty if it could run the call."""
        return next(verdict.reasons for verdict in self.verdicts if verdict.name == name)

    def to_json(self) -> str:
        data: dict[str, Any] = asdict(self)
        data["spec"] = {field: str(value) for field, value in self.spec._asdict().items()}
        data["verdicts"] = [
            {"backend": name, "reasons": [reason._asdict() for reason in reasons]} for name, reasons in self.verdicts
        ]
        return json.dumps(data, indent=2)

    def __str__(self) -> str:
        lines = [f"Call:     {self.call}", f"Request:  {self.request}"]
        kernel = f" ({self.kernel})" if self.kernel else ""
        lines.append(f"Backend:  {self.backend}{kernel}" if self.backend else "Backend:  none: the call is refused")
        lines += [f"Copies:   {copy.adapter}: {copy.what}, {copy.bytes:,} bytes" for copy in self.copies]
        lines.append(f"Order:    {self.measured}")
        able = [verdict.name for verdict in self.verdicts if verdict.accepted and verdict.name != self.backend]
        lines.append(f"Could:    {', '.join(able) or 'no other backend'}")
        for name, reasons in self.verdicts:
            lines += [f"Not {name}: {reason}\n     -> {reason.fix}" for reason in reasons]
        return "\n".join(lines)


def decide(call: AttentionCall, request: Request, device: str | torch.device | None = None) -> Decision:
    """The :class:`Decision` on a call; loads vendor packages only to find out whether they are usable."""
    spec = _on_device(spec_of(call), device)
    name, error = None, None
    try:
        name = plan_for(request, spec, call).backend.name
    except (BackendRejectedError, BackendUnavailableError, NoBackendError) as refusal:
        error = str(refusal)
    names = sorted(registry.names(), key=lambda other: (other != name, other))
    verdicts = tuple(verdict_on(other, spec) for other in names)
    order = preference.ORDERS.get(preference.platform(spec))
    measured = order.measured if order else "untested platform"
    if name is None:
        return Decision(str(request), describe(call, spec), spec, None, None, (), verdicts, measured, error)
    backend = registry.get(name)
    copies = tuple(
        Copy(adapter, adapt.ADAPTERS[adapter].what, adapt.ADAPTERS[adapter].bytes(call))
        for adapter in backend.adapters(spec)
    )
    on_its_device = call.query.device.type == spec.device
    kernel = backend.kernel(call) if backend.kernel and on_its_device else None
    return Decision(str(request), describe(call, spec), spec, name, kernel, copies, verdicts, measured)


def _on_device(spec: CallSpec, device: str | torch.device | None) -> CallSpec:
    if device is None:
        if spec.device != "meta":
            return spec
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        device = accelerator or "cpu"
    device = torch.device(device)
    known = device.type != "cuda" or torch.cuda.is_available()
    return spec._replace(device=device.type, architecture=architecture(device.type, device.index) if known else "")
