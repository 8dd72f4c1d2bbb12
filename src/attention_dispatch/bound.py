"""The short way: what runs calls that look like one seen before, without deciding again."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .call import AttentionCall, AttentionOutput, CallSpec
from .masks import Mask, normalise
from .request import Request
from .resolve import Plan, limits_on
from .tuning import store

# Called with query, key, value, and the caller's mask if the call has one.
Run = Callable[..., Tensor]

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

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, *mask: Tensor) -> Tensor:
        if forward_ad._current_level >= 0:
            raise KeyError("derivatives in forward mode, which requires_grad does not tell")
        return self._ways[
            _grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad),
            self._by_strides and query.is_contiguous() and key.is_contiguous() and value.is_contiguous(),
            _autocast_dtype(query) if _any_autocast() else None,
        ](query, key, value, *mask)

    def add(self, query: Tensor, key: Tensor, value: Tensor, run: Run) -> None:
        """Take ``run`` for calls in the state of this one."""
        if forward_ad._current_level >= 0:
            return
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
        plan: the decision on the call, which has no ``attention_kwargs``.
        request: which led to it. call, spec: the call.
        known: the function that calls of this shape have so far; None for the first.
    """
    backend = plan.backend
    run = None if backend.bind is None else backend.bind(call)
    always = request.mode == "demand" and not backend.external and not limits_on(backend, spec._replace(grad=True))
    if run is not None and always:
        # One of torch's, which needs no proof to run these calls with gradients too; its kernel checks its own arguments.
        return run
    choices = known if isinstance(known, Choices) else Choices(spec.device)
    if run is None:
        run = _direct(backend.forward, call) if call.mask is None else _masked(backend.forward, call, call.mask)
    choices.add(call.query, call.key, call.value, run)
    return choices


def _direct(forward: Callable[[AttentionCall], AttentionOutput], call: AttentionCall) -> Run:
    """A kernel that trusts its arguments, behind the checks that a shape leaves open."""
    fits = _fits(call)
    dropout_p, is_causal, scale, enable_gqa = call.dropout_p, call.is_causal, call.scale, call.enable_gqa

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if not fits(query, key, value):
            raise KeyError("not as a kernel needs it: the long way tells, or copies")
        return forward(AttentionCall(query, key, value, None, dropout_p, is_causal, scale, enable_gqa)).out

    return run


def _masked(forward: Callable[[AttentionCall], AttentionOutput], call: AttentionCall, like: Mask) -> Run:
    """The same for calls with a mask of the kind and the extent of ``like``."""
    fits = _fits(call)
    dropout_p, is_causal, scale, enable_gqa = call.dropout_p, call.is_causal, call.scale, call.enable_gqa
    batch, q_len, heads, _head_dim = call.query.shape
    k_len, device = call.key.shape[1], call.query.device
    # Key padding, in normal form, has two dimensions and every other mask four; the dtype is part of the key.
    shape = None if like.tensor is None else like.tensor.shape

    def run(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor) -> Tensor:
        mask = normalise(attn_mask, batch, heads, q_len, k_len, device)
        if (
            mask is None
            or mask.tensor is None
            or mask.tensor.shape != shape
            or mask.tensor.requires_grad
            or not fits(query, key, value)
        ):
            raise KeyError("not like the call that was decided on: the long way tells")
        return forward(AttentionCall(query, key, value, mask, dropout_p, is_causal, scale, enable_gqa)).out

    return run


def _fits(call: AttentionCall) -> Callable[[Tensor, Tensor, Tensor], bool]:
    """Whether tensors of the shapes, and a query of the dtype and device, of ``call`` are as a kernel needs them."""
    dtype, device = call.query.dtype, call.query.device

    def fits(query: Tensor, key: Tensor, value: Tensor) -> bool:
        return (
            key.dtype is dtype
            and value.dtype is dtype
            and key.device == device
            and value.device == device
            and query.stride(3) == key.stride(3) == value.stride(3) == 1
        )

    return fits
