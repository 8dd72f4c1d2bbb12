"""What is worth measuring for a call, and how each candidate is run on the call's own tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import preference, registry
from ..call import AttentionCall, AttentionOutput, CallSpec
from ..masks import Mask
from ..registry import Backend
from ..resolve import verdict_on

# They build the score matrix: never the fastest where anything else runs, and a danger to memory.
_UNFUSED = ("_native_math", "reference")


def candidates(spec: CallSpec, quantised: bool, names: Sequence[str] | None = None) -> list[Backend]:
    """Backends that can run calls with these facts and may be the fastest, the static order's first.

    What is only on the Hub counts once it is loaded in this process: measuring downloads nothing.
    """
    wanted = list(names) if names is not None else [*preference.static_order(spec, quantised), *registry.names()]
    able = []
    for name in dict.fromkeys(wanted):
        if name not in registry.names():
            continue
        backend = registry.get(name)
        if names is None and ((backend.quantised and not quantised) or _needs_download(name)):
            continue
        if not preference.found_wrong(name, spec) and verdict_on(name, spec).accepted:
            able.append(backend)
    if names is not None:
        return able
    fused = [backend for backend in able if backend.name not in _UNFUSED]
    lean = [backend for backend in fused if "dense_mask" not in backend.adapters(spec)]
    return lean or fused or able


def _needs_download(name: str) -> bool:
    return name.endswith("_hub") and name not in registry._states


def runner(backend: Backend, call: AttentionCall, spec: CallSpec) -> Callable[[], AttentionOutput]:
    """A function that runs a call once, forward and, where the call needs gradients, backward."""
    if not spec.grad:

        def forward() -> AttentionOutput:
            with torch.no_grad():
                return backend.forward(call)

        return forward
    detached = _detached(call)
    leaves = list(_leaves(detached).values())
    grad_out: list[Tensor] = []

    def forward_and_backward() -> AttentionOutput:
        with torch.enable_grad():
            output = backend.forward(detached)
        if not grad_out:
            grad_out.append(torch.randn_like(output.out))
        torch.autograd.grad(output.out, leaves, grad_out[0])
        return AttentionOutput(output.out.detach(), output.lse)

    return forward_and_backward


def gradients(backend: Backend, call: AttentionCall, grad_out: Tensor) -> dict[str, Tensor]:
    """Gradients of a call by name (``query``, ``key``, ``value``, ``mask``), of what needs them."""
    detached = _detached(call)
    leaves = _leaves(detached)
    with torch.enable_grad():
        out = backend.forward(detached).out
    return dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), grad_out)))


def _leaves(call: AttentionCall) -> dict[str, Tensor]:
    named = {"query": call.query, "key": call.key, "value": call.value}
    if call.mask is not None and call.mask.tensor is not None:
        named["mask"] = call.mask.tensor
    return {name: tensor for name, tensor in named.items() if tensor.requires_grad}


def _detached(call: AttentionCall) -> AttentionCall:
    """The call on leaves that share its memory and strides, outside of the caller's graph."""

    def leaf(tensor: Tensor) -> Tensor:
        return tensor.detach().requires_grad_(tensor.requires_grad)

    mask = call.mask
    if mask is not None and mask.tensor is not None and mask.tensor.requires_grad:
        mask = Mask(mask.kind, leaf(mask.tensor))
    return call.replaced(query=leaf(call.query), key=leaf(call.key), value=leaf(call.value), mask=mask)
