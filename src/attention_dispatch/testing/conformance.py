"""Run one case on one backend: exact, or refused with exactly the reasons that its declared capabilities predict."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import registry
from ..api import dispatch_attention_fn
from ..call import canonicalise, spec_of
from ..capabilities import Capabilities, reasons_against, row_for
from ..errors import AttentionDispatchError, BackendRejectedError
from ..registry import Backend, register_backend, unregister_backend
from ..resolve import verdict_on
from .cases import Case, Inputs, build
from .oracle import Exact, attend, differentiated, eight_bit_attention, exact_attention, output_gradient
from .poison import poisoned_memory
from .tolerances import declared_difference, declared_lse_difference, difference

# Reasons that depend on the installed package rather than on what is declared.
_OF_THE_INSTALLATION = ("known_bad", "self_test")
_NAMES = ("query", "key", "value", "mask")
# Standard deviations by which the rate of dropped weights may be off.
_DROPOUT_SIGMAS = 6.0
# FlashAttention draws 8-bit random numbers, which rounds the rate.
_DROPOUT_STEP = 1 / 256


class ConformanceError(AssertionError):
    """A backend does not keep the contract."""


class Outcome(NamedTuple):
    """What happened to a case.

    Attributes:
        status: ``"computed"`` or ``"refused"``.
        codes: of the reasons of a refusal.
    """

    status: str
    codes: frozenset[str] = frozenset()


def check_conformance(backend: str | Backend, case: Case, device: str | torch.device = "cpu") -> Outcome:
    """Run a case through the public dispatcher.

    Args:
        backend: a registered name; or an object, which is registered under its name for the duration, for example
            one over a fake package with other devices.
        case: see :func:`~attention_dispatch.testing.conformance_cases`.
        device: where the tensors live.

    Raises:
        ConformanceError: a wrong result, a changed input, a refusal that was not predicted, or a prediction of one
            that did not come. Anything else that is raised is a crash of the backend.
        BackendUnavailableError: the backend cannot be used on this machine.

    Example:
        >>> from attention_dispatch.testing import check_conformance, conformance_cases
        >>> check_conformance("native", conformance_cases("cpu")[0]).status
        'computed'
    """
    if isinstance(backend, Backend):
        with _registered(backend):
            return _check(backend, case, torch.device(device))
    registry.require(backend)
    return _check(registry.get(backend), case, torch.device(device))


def predicted_codes(backend: Backend, case: Case, inputs: Inputs) -> frozenset[str]:
    """The codes with which the declared capabilities refuse a case; empty if they promise to serve it."""
    arguments = dict(case.arguments)
    with _autocast(case, inputs.query.device):
        call = canonicalise(inputs.query, inputs.key, inputs.value, inputs.mask.argument, **arguments)
        spec = spec_of(call)
    declared = (*reasons_against(backend.capabilities, spec), *backend.extra_reasons(spec))
    installed = () if declared else verdict_on(backend.name, spec).reasons
    return frozenset(
        [reason.code for reason in declared]
        + [reason.code for reason in installed if reason.code in _OF_THE_INSTALLATION]
    )


@contextlib.contextmanager
def _registered(backend: Backend) -> Iterator[None]:
    before = registry.registry.get(backend.name)
    register_backend(backend, replace=True)
    try:
        yield
    finally:
        unregister_backend(backend.name)
        if before is not None:
            registry._rows[backend.name] = before
            registry.forget_status(backend.name)


def _autocast(case: Case, device: torch.device) -> Any:
    if case.autocast is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=case.autocast)


def _check(backend: Backend, case: Case, device: torch.device) -> Outcome:
    inputs = build(case, device)
    codes = predicted_codes(backend, case, inputs)
    if codes:
        _check_refusal(backend, case, inputs, codes)
        return Outcome("refused", codes)
    before = [tensor.detach().clone() for tensor in inputs[:3]]
    first = _run(backend, case, inputs)
    # The second call of a kind takes the remembered way.
    second = _run(backend, case, inputs)
    row = row_for(backend.capabilities, device.type)
    assert row is not None
    if case.dropout_p:
        _check_dropout(backend, case, inputs, first)
        if torch.equal(first.out, second.out):
            _fail(backend, case, "two calls with dropout gave the same output")
    else:
        exact = exact_attention(case, inputs)
        # What rounding alone does, in the dtype of the call or to 8 bits.
        low = (
            eight_bit_attention(case, inputs)
            if row.tolerance.relative_l2
            else exact_attention(case, inputs, case.compute_dtype)
        )
        for result in (first, second):
            _check_result(backend, case, row, result, exact, low)
        if case.deterministic and not all(map(torch.equal, _tensors(first), _tensors(second))):
            _fail(backend, case, "two deterministic calls differ")
    for name, tensor, copy in zip(_NAMES, inputs[:3], before, strict=False):
        if not torch.equal(tensor, copy):
            _fail(backend, case, f"{name} was written to")
    return Outcome("computed")


class _Result(NamedTuple):
    out: Tensor
    lse: Tensor | None
    grads: tuple[Tensor, ...]


def _tensors(result: _Result) -> list[Tensor]:
    return [result.out, *([] if result.lse is None else [result.lse]), *result.grads]


def _call(backend: Backend, case: Case, inputs: Inputs) -> Any:
    with _autocast(case, inputs.query.device):
        return dispatch_attention_fn(
            inputs.query, inputs.key, inputs.value, inputs.mask.argument, backend=backend.name, **case.arguments
        )


def _run(backend: Backend, case: Case, inputs: Inputs) -> _Result:
    shape = (*inputs.query.shape[:3], inputs.value.shape[3])
    output_like = torch.zeros(shape, dtype=case.compute_dtype, device=inputs.query.device)
    with poisoned_memory(output_like):
        try:
            result = _call(backend, case, inputs)
        except AttentionDispatchError as error:
            raise ConformanceError(
                f"{backend.name!r} declares that it serves {case.name!r} and refused it: {error}"
            ) from error
        if case.lse != isinstance(result, tuple):
            _fail(backend, case, f"return_lse={case.lse} returned {type(result).__name__}")
        out, lse = result if isinstance(result, tuple) else (result, None)
        wanted = differentiated(case, (*inputs[:3], inputs.mask.bias))
        if bool(wanted) != out.requires_grad:
            _fail(
                backend,
                case,
                f"gradients needed: {bool(wanted)}, but the output's requires_grad is {out.requires_grad}",
            )
        grads = torch.autograd.grad(out, wanted, output_gradient(case, out)) if wanted else ()
    if lse is not None and lse.requires_grad:
        _fail(backend, case, "the LSE must be detached")
    return _Result(out.detach(), lse, grads)


def _check_refusal(backend: Backend, case: Case, inputs: Inputs, codes: frozenset[str]) -> None:
    try:
        _call(backend, case, inputs)
    except BackendRejectedError as error:
        if frozenset(error.codes) != codes:
            raise ConformanceError(
                f"{backend.name!r} refused {case.name!r} with {sorted(error.codes)}, declared {sorted(codes)}"
            ) from error
        without = [reason.code for reason in error.reasons if not reason.fix]
        if without:
            raise ConformanceError(f"{backend.name!r}, {case.name!r}: no fix for {without}") from error
        return
    _fail(backend, case, f"ran, though its capabilities refuse it with {sorted(codes)}")


def _check_result(backend: Backend, case: Case, row: Capabilities, result: _Result, exact: Exact, low: Exact) -> None:
    dtype = case.compute_dtype
    if result.out.dtype != dtype:
        _fail(backend, case, f"the output is {result.out.dtype}, expected {dtype}")
    declared = row.tolerance if row.tolerance.relative_l2 else None
    if declared is None:
        problem = difference(result.out, exact.out, low.out, dtype)
    else:
        problem = declared_difference(result.out, exact.out, low.out, declared)
    if problem:
        _fail(backend, case, f"output: {problem}")
    if case.lse:
        if result.lse is None:
            raise ConformanceError(f"{backend.name!r}, case {case.name!r}: return_lse=True gave no LSE")
        if result.lse.dtype != torch.float32:
            _fail(backend, case, f"the LSE is {result.lse.dtype}, expected torch.float32")
        lse_dtype = torch.float32 if dtype == torch.float64 else dtype
        problem = (
            difference(result.lse, exact.lse, low.lse, lse_dtype, unit=1.0)
            if declared is None
            else declared_lse_difference(result.lse, exact.lse, low.lse)
        )
        if problem:
            _fail(backend, case, f"LSE: {problem}")
    names = (*(_NAMES[:3] if case.grad else ()), *(_NAMES[3:] if case.mask_grad else ()))
    largest = max((float(grad.abs().max()) for grad in exact.grads), default=0.0)
    for name, grad, truth, rough in zip(names, result.grads, exact.grads, low.grads, strict=True):
        # A float32 mask beside float64 tensors has a float32 gradient.
        coarser = max(dtype, grad.dtype, key=lambda dtype: torch.finfo(dtype).eps)
        problem = difference(grad, truth, rough, coarser, cancelled=largest)
        if problem:
            _fail(backend, case, f"gradient of {name}: {problem}")


def _check_dropout(backend: Backend, case: Case, inputs: Inputs, result: _Result) -> None:
    """v is the identity, so the output is the matrix of weights: each is dropped or divided by 1 - p."""
    wide = [tensor.detach().double() for tensor in inputs[:3]]
    weights, _lse = attend(*wide, keep=inputs.mask.keep, is_causal=case.is_causal, scale=case.scale)
    kept = weights / (1 - case.dropout_p)
    actual = result.out.double()
    dropped = actual == 0
    step = 8 * torch.finfo(case.compute_dtype).eps
    wrong = ~dropped & ((actual - kept).abs() > (step + 2 * _DROPOUT_STEP) * kept)
    if bool(wrong.any()):
        _fail(backend, case, f"{int(wrong.sum())} weights are neither dropped nor divided by 1 - dropout_p")
    visible = weights > 0
    count = int(visible.sum())
    rate = float((dropped & visible).sum() / count)
    spread = (case.dropout_p * (1 - case.dropout_p) / count) ** 0.5
    if abs(rate - case.dropout_p) > _DROPOUT_SIGMAS * spread + _DROPOUT_STEP:
        _fail(backend, case, f"{rate:.4f} of {count} weights were dropped, asked for {case.dropout_p}")
    if case.grad:
        # The backward pass must drop the same weights: d(value) = weights^T d(out) with the weights just seen.
        upstream = output_gradient(case, result.out).double()
        expected = torch.einsum("bqhk,bqhv->bkhv", actual, upstream)
        rough = torch.einsum("bqhk,bqhv->bkhv", result.out, upstream.to(result.out.dtype))
        problem = difference(result.grads[2], expected, rough, case.compute_dtype)
        if problem:
            _fail(backend, case, f"gradient of value under dropout: {problem}")


def _fail(backend: Backend, case: Case, what: str) -> None:
    raise ConformanceError(f"{backend.name!r}, case {case.name!r}: {what}")
