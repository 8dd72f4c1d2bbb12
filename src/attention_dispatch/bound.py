"""The short way: what runs calls that look like one seen before, without deciding again."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .call import AttentionCall, AttentionOutput, CallSpec
from .request import Request
from .resolve import Plan
from .tuning import store

Run = Callable[[Tensor, Tensor, Tensor], Tensor]

_grad_enabled = torch.is_grad_enabled
_any_autocast = torch._C._is_any_autocast_enabled


class Choices:
    """Functions for calls of one shape, dtype and request, by all else on which the choice of a backend depends.

    Called with what it has no function for, it raises KeyError.
    """

    __slots__ = ("_by_strides", "_ways")

    def __init__(self, device: str) -> None:
        self._ways: dict[tuple[bool, bool, torch.dtype | None], Run] = {}
        # Only measured choices depend on strides. Whoever changes the store drops this object.
        self._by_strides = bool(store.entries(device))

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self._ways[
            _grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad),
            self._by_strides and query.is_contiguous() and key.is_contiguous() and value.is_contiguous(),
            _autocast_dtype(query) if _any_autocast() else None,
        ](query, key, value)

    def add(self, query: Tensor, key: Tensor, value: Tensor, run: Run) -> None:
        """Take ``run`` for calls in the state of this one."""
        self._ways[
            _grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad),
            self._by_strides and query.is_contiguous() and key.is_contiguous() and value.is_contiguous(),
            _autocast_dtype(query) if _any_autocast() else None,
        ] = run


def _autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def short_way(plan: Plan, request: Request, call: AttentionCall, spec: CallSpec, known: Run | None) -> Run:
    """The function for calls that look like this one.

    Args:
        plan: the decision on the call, which has no mask and no ``attention_kwargs``.
        request: which led to it. call, spec: the call.
        known: the function that calls of this shape have so far; None for the first.
    """
    backend = plan.backend
    run = None if backend.bind is None else backend.bind(call)
    if run is not None and request.mode == "demand":
        # One backend, whatever else is true of a call; and its kernel checks its own arguments.
        return run
    choices = known if isinstance(known, Choices) else Choices(spec.device)
    choices.add(call.query, call.key, call.value, run or _direct(backend.forward, call))
    return choices


def _direct(forward: Callable[[AttentionCall], AttentionOutput], call: AttentionCall) -> Run:
    """A kernel that trusts its arguments, behind the checks that a shape leaves open."""
    dtype, device = call.query.dtype, call.query.device
    dropout_p, is_causal, scale, enable_gqa = call.dropout_p, call.is_causal, call.scale, call.enable_gqa

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if (
            key.dtype is not dtype
            or value.dtype is not dtype
            or key.device != device
            or value.device != device
            or query.stride(3) != 1
            or key.stride(3) != 1
            or value.stride(3) != 1
        ):
            raise KeyError("not as a kernel needs it: the long way tells, or copies")
        return forward(AttentionCall(query, key, value, None, dropout_p, is_causal, scale, enable_gqa)).out

    return run
