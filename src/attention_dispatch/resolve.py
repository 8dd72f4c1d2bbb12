"""From the facts of a call and a request to a plan: which backend runs it, and why not each other one."""

from __future__ import annotations

import threading
import warnings
from typing import NamedTuple

from . import preference, registry, self_test
from .call import AttentionCall, CallSpec, describe, describe_kind
from .capabilities import reasons_against
from .errors import BackendRejectedError, NoBackendError, Reason, none_left_message, rejected_message
from .registry import Backend
from .request import AUTO, AUTO_QUANTIZED, Request
from .tuning import store
from .tuning.store import Extent


class Verdict(NamedTuple):
    """What was decided about one candidate; no reasons means accepted."""

    name: str
    reasons: tuple[Reason, ...]

    @property
    def accepted(self) -> bool:
        return not self.reasons


class Plan(NamedTuple):
    """A decision for all calls with the same facts under the same request.

    Attributes:
        backend: what runs them.
        verdicts: candidates in the order they were considered, the accepted one last.
        adapters: names in ``adapt.ADAPTERS`` of the conversions these calls need.
    """

    backend: Backend
    verdicts: tuple[Verdict, ...]
    adapters: tuple[str, ...]


_plans: dict[tuple[Request, CallSpec, object], Plan] = {}
_lock = threading.Lock()
registry._on_change.append(_plans.clear)
store.on_change.append(_plans.clear)


def plan_for(request: Request, spec: CallSpec, call: AttentionCall | None = None) -> Plan:
    """The plan for a request and the facts of a call; remembered.

    Args:
        request: validated request.
        spec: facts of the call.
        call: the call itself where there is one: its lengths for measured choices, its shapes for error texts.

    Raises:
        BackendUnavailableError: a demand whose backend is not usable here.
        BackendRejectedError: a demand whose backend cannot run the call.
        NoBackendError: no candidate of a permission, or of ``auto``, can.
    """
    lengths = extent_of(call) if call is not None and request.mode in (AUTO, AUTO_QUANTIZED) else None
    key = (request, spec, preference.bucket(lengths))
    plan = _plans.get(key)
    if plan is None:
        began = store.generation()
        plan = _resolve(request, spec, call, lengths)
        with _lock:
            _plans[key] = plan
        if store.generation() != began:
            # Another thread changed what the plan rests on after it was made.
            _plans.pop(key, None)
        if call is not None:
            _warn_of_math(plan, spec, call)
    return plan


def extent_of(call: AttentionCall) -> Extent:
    """The sizes on which a measured choice depends."""
    query, key, value = call.query, call.key, call.value
    contiguous = query.is_contiguous() and key.is_contiguous() and value.is_contiguous()
    return Extent(query.shape[0], query.shape[1], key.shape[1], contiguous)


def verdict_on(name: str, spec: CallSpec) -> Verdict:
    """Capable, available, and proven on first use: all reasons why a backend cannot run calls with these facts."""
    backend = registry.get(name)
    capable = limits_on(backend, spec)
    if capable:
        # Not capable is known without loading a vendor package, and is the more useful answer.
        return Verdict(name, capable)
    return Verdict(name, registry.status(name).reasons or self_test.reasons(backend, spec))


def limits_on(backend: Backend, spec: CallSpec) -> tuple[Reason, ...]:
    """What the backend declares against such calls, whether it is installed or not."""
    return (*reasons_against(backend.capabilities, spec), *_joint_limits(backend, spec))


def _joint_limits(backend: Backend, spec: CallSpec) -> tuple[Reason, ...]:
    """Its ``extra_reasons``; those of another package may fail, which must break neither lists nor other backends."""
    try:
        return backend.extra_reasons(spec)
    except Exception as error:
        what = f"asking for its limits raised {type(error).__name__}: {error}"
        return (Reason("broken", what, "report it to the authors of the backend, or use backend='native'."),)


def candidates(request: Request, spec: CallSpec, lengths: Extent | None = None) -> tuple[str, ...]:
    """Names in the order in which a request considers them."""
    if request.mode in (AUTO, AUTO_QUANTIZED):
        return preference.order(spec, quantised=request.mode == AUTO_QUANTIZED, lengths=lengths)
    return request.names


def _resolve(request: Request, spec: CallSpec, call: AttentionCall | None, lengths: Extent | None) -> Plan:
    verdicts: list[Verdict] = []
    costly: tuple[Backend, tuple[str, ...]] | None = None
    for name in candidates(request, spec, lengths):
        if request.mode == "demand":
            registry.require(name)
        verdict = verdict_on(name, spec)
        verdicts.append(verdict)
        if not verdict.accepted:
            continue
        backend = registry.get(name)
        adapters = backend.adapters(spec)
        if request.mode in (AUTO, AUTO_QUANTIZED) and "dense_mask" in adapters:
            # Keep as the last resort: another kernel may not need a Q x K mask.
            costly = costly or (backend, adapters)
            continue
        return Plan(backend, tuple(verdicts), adapters)
    if costly is not None:
        return Plan(costly[0], tuple(verdicts), costly[1])
    raise _refusal(request, spec, describe_kind(spec) if call is None else describe(call, spec), verdicts)


def _refusal(request: Request, spec: CallSpec, text: str, verdicts: list[Verdict]) -> Exception:
    if request.mode == "demand":
        [verdict] = verdicts
        alternatives = [name for name in preference.order(spec) if verdict_on(name, spec).accepted]
        return BackendRejectedError(
            rejected_message(verdict.name, text, verdict.reasons, alternatives), verdict.reasons
        )
    refusals = {verdict.name: verdict.reasons for verdict in verdicts}
    reasons = tuple(reason for verdict in verdicts for reason in verdict.reasons)
    return NoBackendError(none_left_message(str(request), text, refusals), reasons)


def _warn_of_math(plan: Plan, spec: CallSpec, call: AttentionCall) -> None:
    """Warn, once per kind of call, that torch runs unfused on a GPU what another backend here can run fused."""
    kernel = plan.backend.kernel
    if kernel is None or spec.device != "cuda" or "MATH" not in kernel(call):
        return
    for name in preference.order(spec):
        if name not in (plan.backend.name, "_native_math", "reference") and verdict_on(name, spec).accepted:
            warnings.warn(
                f"{plan.backend.name!r} runs this call with aten MATH, which builds the full score matrix; "
                f"backend={name!r} runs it fused ({describe(call, spec)}).",
                stacklevel=5,
            )
            return
