"""The answer to "which backend, why, and why not that one", as data with a readable text."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch

from . import adapt, known_bad, preference, registry
from .call import AttentionCall, CallSpec, architecture, describe, spec_of
from .errors import BackendRejectedError, BackendUnavailableError, NoBackendError, Reason
from .origin import BY_CALL, Origin
from .request import Request
from .resolve import Verdict, extent_of, plan_for, verdict_on
from .tuning import store
from .tuning.store import Extent


@dataclass(frozen=True)
class Copy:
    """A conversion that writes memory before the kernel runs."""

    adapter: str
    what: str
    bytes: int


class Counterfactual(NamedTuple):
    """A backend that one change to the call would let run.

    Attributes:
        backend: its name. change: what would have to be different. code: of the reasons that would be gone.
        ratio: how many times as fast as the chosen backend on the call as it is, where both were measured.
        source: where that was measured.
    """

    backend: str
    change: str
    code: str
    ratio: float | None = None
    source: str = ""

    def __str__(self) -> str:
        speed = "" if self.ratio is None else f" {self.ratio:.2g} x as fast as the choice ({self.source})"
        if self.code == "deterministic":
            return f"{self.backend!r} is excluded by your deterministic=True; without it, it would run{speed}"
        return f"{self.backend!r} would run{speed} if {self.change}"


@dataclass(frozen=True)
class Decision:
    """What would happen to a call.

    Attributes:
        request: what was asked for. origin: by whom; see ``origin.Origin``.
        call: the call in words.
        spec: its facts.
        backend: name of the backend that runs it; None if it is refused.
        kernel: the kernel that the backend picks, where it chooses between several.
        copies: conversions before the kernel, with their bytes.
        verdicts: every registered backend with its reasons: the chosen one, those asked for, the others.
        measured: what the order of preference rests on.
        error: text of the error that the call would raise, if any.
        counterfactuals: what would run if the call were different, with measured ratios where there are any.
        times_us: measured times of this kind of call on this machine, by backend; empty if it was never measured.
        notes: what is known or was found on this machine about the backend.
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
    counterfactuals: tuple[Counterfactual, ...] = ()
    times_us: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    origin: Origin = BY_CALL

    def why_not(self, name: str) -> tuple[Reason, ...]:
        """The reasons against a backend; empty if it could run the call."""
        return next(verdict.reasons for verdict in self.verdicts if verdict.name == name)

    def to_json(self) -> str:
        data: dict[str, Any] = asdict(self)
        data["counterfactuals"] = [counterfactual._asdict() for counterfactual in self.counterfactuals]
        data["origin"] = self.origin._asdict()
        data["spec"] = {field: str(value) for field, value in self.spec._asdict().items()}
        data["verdicts"] = [
            {"backend": name, "reasons": [reason._asdict() for reason in reasons]} for name, reasons in self.verdicts
        ]
        return json.dumps(data, indent=2)

    def __str__(self) -> str:
        lines = [f"Call:     {self.call}", f"Request:  {self.request} ({self.origin})"]
        kernel = f" ({self.kernel})" if self.kernel else ""
        lines.append(f"Backend:  {self.backend}{kernel}" if self.backend else "Backend:  none: the call is refused")
        lines += [f"Copies:   {copy.adapter}: {copy.what}, {copy.bytes:,} bytes" for copy in self.copies]
        lines += [f"Note:     {note}" for note in self.notes]
        if "auto" in self.request:
            lines.append(f"Order:    {self.measured}")
        if self.times_us:
            times = sorted(self.times_us.items(), key=lambda item: item[1])
            lines.append(
                "Measured: " + ", ".join(f"{name} {time:.1f} us" for name, time in times) + ", on this machine"
            )
        lines += [f"What if:  {counterfactual}" for counterfactual in self.counterfactuals]
        able = [verdict.name for verdict in self.verdicts if verdict.accepted and verdict.name != self.backend]
        lines.append(f"Could:    {', '.join(able) or 'no other backend'}")
        return "\n".join([*lines, *refused_lines(self.verdicts)])


def refused_lines(verdicts: Iterable[tuple[str, tuple[Reason, ...]]]) -> list[str]:
    """What stands against which backends, in words; equal reasons once."""
    refused: dict[tuple[Reason, ...], list[str]] = {}
    for name, reasons in verdicts:
        if reasons:
            refused.setdefault(reasons, []).append(name)
    lines = []
    for reasons, names in refused.items():
        who = textwrap.fill(f"Not {', '.join(names)}:", 100, subsequent_indent="    ", break_on_hyphens=False)
        lines.append(f"{who} {reasons[0]}\n     -> {reasons[0].fix}")
        lines += [f"     and {reason}\n     -> {reason.fix}" for reason in reasons[1:]]
    return lines


def decide(
    call: AttentionCall, request: Request, device: str | torch.device | None = None, origin: Origin = BY_CALL
) -> Decision:
    """The :class:`Decision` on a call; loads vendor packages only to find out whether they are usable."""
    spec = _on_device(spec_of(call), device)
    name, error = None, None
    try:
        name = plan_for(request, spec, call).backend.name
    except (BackendRejectedError, BackendUnavailableError, NoBackendError) as refusal:
        error = str(refusal)
    names = sorted(registry.names(), key=lambda other: (other != name, other not in request.names, other))
    verdicts = tuple(verdict_on(other, spec) for other in names)
    extent = extent_of(call)
    common: dict[str, Any] = {
        "request": str(request),
        "origin": origin,
        "call": describe(call, spec),
        "spec": spec,
        "verdicts": verdicts,
        "measured": preference.measurement(spec),
        "counterfactuals": _counterfactuals(name, spec, extent),
        "times_us": dict((store.measured(spec, extent) or {}).get("times_us", {})),
    }
    if name is None:
        return Decision(backend=None, kernel=None, copies=(), error=error, **common)
    backend = registry.get(name)
    copies = tuple(
        Copy(adapter, adapt.ADAPTERS[adapter].what, adapt.ADAPTERS[adapter].bytes(call))
        for adapter in backend.adapters(spec)
    )
    on_its_device = call.query.device.type == spec.device
    kernel = backend.kernel(call) if backend.kernel and on_its_device else None
    return Decision(backend=name, kernel=kernel, copies=copies, notes=_notes(name, spec), **common)


# By reason code: the change to a call that would take the reason away, in words and as facts.
_CHANGES: dict[str, tuple[str, Callable[[CallSpec], CallSpec]]] = {
    "mask": ("the mask were None", lambda spec: spec._replace(mask="none", mask_per_head=False, mask_grad=False)),
    "gradients": (
        "no gradients were needed (torch.no_grad())",
        lambda spec: spec._replace(grad=False, mask_grad=False),
    ),
    "deterministic": ("deterministic were False", lambda spec: spec._replace(deterministic=False)),
    "dtype": ("the tensors were bfloat16", lambda spec: spec._replace(dtype=torch.bfloat16)),
    "dropout": ("dropout_p were 0", lambda spec: spec._replace(dropout=False)),
    "lse": ("return_lse were False", lambda spec: spec._replace(lse=False)),
    "window": ("window_size were (-1, -1)", lambda spec: spec._replace(window=False)),
    "softcap": ("softcap were 0", lambda spec: spec._replace(softcap=False)),
    "causal": ("is_causal were False", lambda spec: spec._replace(is_causal=False)),
    "gqa": ("k and v had as many heads as q", lambda spec: spec._replace(kv_heads=spec.heads)),
}


def _counterfactuals(chosen: str | None, spec: CallSpec, extent: Extent) -> tuple[Counterfactual, ...]:
    """Backends in the static order that one change would let run, those measured fastest first."""
    found = []
    for name in preference.static_order(spec, quantised=False, lengths=extent):
        if name in ("reference", "_native_math") or name not in registry.names():
            continue
        refused = verdict_on(name, spec).reasons
        if refused and refused == registry.status(name).reasons:
            ratio, source = _ratio(chosen, spec, name, spec, extent)
            found.append(Counterfactual(name, f"it were usable here: {refused[0].fix}", refused[0].code, ratio, source))
            continue
        for code in dict.fromkeys(reason.code for reason in refused):
            if code not in _CHANGES:
                break
            words, change = _CHANGES[code]
            changed = change(spec)
            if changed != spec and verdict_on(name, changed).accepted:
                ratio, source = _ratio(chosen, spec, name, changed, extent)
                found.append(Counterfactual(name, words, code, ratio, source))
                break
    return tuple(sorted(found, key=lambda item: -(item.ratio or 0.0)))


def _ratio(
    chosen: str | None, spec: CallSpec, name: str, changed: CallSpec, extent: Extent
) -> tuple[float | None, str]:
    """Time of the choice now over that of ``name`` after the change, and where both were measured."""
    now, then = store.measured(spec, extent), store.measured(changed, extent)
    if chosen and now and then and chosen in now["times_us"] and name in then["times_us"]:
        return now["times_us"][chosen] / then["times_us"][name], "measured on this machine"
    rates = preference.RATES.get(spec.architecture, {})
    here, there = (rates.get((facts.head_dim, facts.is_causal), {}) for facts in (spec, changed))
    # Those figures are for forward passes without a mask; they say nothing of a choice that has to serve one.
    plain = spec.mask == "none" and not spec.grad
    if chosen and plain and spec.is_causal == changed.is_causal and chosen in here and name in there:
        return there[name] / here[chosen], "H100, 1x16384, 24 heads, 2026-11-23 and 25"
    return None, ""


def _notes(name: str, spec: CallSpec) -> tuple[str, ...]:
    notes = known_bad.notes(name, spec)
    verdict = store.verdict(name, spec.device)
    if verdict is not None and verdict["state"] != "ok":
        found = f"attention-dispatch doctor found {name!r} {verdict['state']} on {verdict.get('date', 'this machine')}"
        notes += (f"{found}: {verdict.get('what', '')}",)
    return notes


def _on_device(spec: CallSpec, device: str | torch.device | None) -> CallSpec:
    if device is None:
        if spec.device != "meta":
            return spec
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        device = accelerator or "cpu"
    device = torch.device(device)
    known = device.type != "cuda" or torch.cuda.is_available()
    return spec._replace(device=device.type, architecture=architecture(device.type, device.index) if known else "")
