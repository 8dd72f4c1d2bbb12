"""One operator through which external kernels appear in a traced graph.

Vendor functions cannot be traced in general. Eager calls go straight to them; while compiling, the call becomes
``attention_dispatch::external_attention``, whose shapes are known and whose gradient repeats the forward pass. Its
layout is that of the kernels: (B, S, H, D), or (T, H, D) for packed sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

EXTRAS = 4


class Arguments(NamedTuple):
    """What a kernel is asked, in its own alignment.

    Attributes:
        scale: factor of the scores.
        is_causal, left, right: causal flag and window as the kernel takes them; -1 is unbounded.
        longest_query, longest_key: longest sequence of a packed call, else 0.
        option_names, option_values: backend options as text, in step.
    """

    scale: float
    is_causal: bool = False
    left: int = -1
    right: int = -1
    softcap: float = 0.0
    dropout_p: float = 0.0
    deterministic: bool = False
    return_lse: bool = False
    longest_query: int = 0
    longest_key: int = 0
    option_names: tuple[str, ...] = ()
    option_values: tuple[str, ...] = ()


Extras = tuple[Tensor | None, ...]
Body = Callable[[Tensor, Tensor, Tensor, Extras, Arguments], tuple[Tensor, Tensor | None]]

_bodies: dict[str, Body] = {}


def register(name: str, body: Body) -> None:
    """Make ``body`` reachable from a graph under the name of its backend.

    Args:
        body: ``(query, key, value, extras, arguments) -> (out, lse)``; ``extras`` are up to four tensors such as
            sequence starts or a mask. ``out`` is query-like with value's last dimension, ``lse`` float32 (B, H, Q) or
            (H, T), None if not asked for.
    """
    _bodies[name] = body


def run(
    name: str, query: Tensor, key: Tensor, value: Tensor, extras: Extras, arguments: Arguments
) -> tuple[Tensor, Tensor | None]:
    """Call a registered body: directly, or as an operator while compiling."""
    if not torch.compiler.is_compiling():
        return _bodies[name](query, key, value, extras, arguments)
    padded = extras + (None,) * (EXTRAS - len(extras))
    out, lse, _rng = torch.ops.attention_dispatch.external_attention(
        name, query, key, value, *padded, *_flat(arguments)
    )
    return out, lse if arguments.return_lse else None


_FACTS = (
    "str name, Tensor query, Tensor key, Tensor value, Tensor? a, Tensor? b, Tensor? c, Tensor? d, float scale, "
    "bool is_causal, SymInt left, SymInt right, float softcap, float dropout_p, bool deterministic, bool return_lse, "
    "SymInt longest_query, SymInt longest_key, str[] option_names, str[] option_values"
)
_library = torch.library.Library("attention_dispatch", "FRAGMENT")
# Seeded, so that two calls with dropout are never merged into one.
_TAGS = (torch.Tag.nondeterministic_seeded,)
_library.define(f"external_attention({_FACTS}) -> (Tensor, Tensor, Tensor)", tags=_TAGS)
_library.define(
    f"external_attention_backward(Tensor grad_out, Tensor rng_state, {_FACTS}) -> (Tensor, Tensor, Tensor)", tags=_TAGS
)


def _flat(arguments: Arguments) -> tuple:
    return (*arguments[:-2], list(arguments.option_names), list(arguments.option_values))


def _rebuilt(flat: tuple) -> Arguments:
    return Arguments._make((*flat[:-2], tuple(flat[-2]), tuple(flat[-1])))


def _rng_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _forward(name: str, query: Tensor, key: Tensor, value: Tensor, a, b, c, d, *flat) -> tuple[Tensor, Tensor, Tensor]:
    arguments = _rebuilt(flat)
    state = _rng_state(query.device) if arguments.dropout_p else torch.empty(0, dtype=torch.uint8, device="cpu")
    out, lse = _bodies[name](query, key, value, (a, b, c, d), arguments)
    if lse is None:
        lse = query.new_empty(0, dtype=torch.float32)
    return out.contiguous(), lse.contiguous(), state


def _backward(
    grad_out: Tensor, rng_state: Tensor, name: str, query: Tensor, key: Tensor, value: Tensor, a, b, c, d, *flat
) -> tuple[Tensor, Tensor, Tensor]:
    arguments = _rebuilt(flat)
    device = query.device
    with torch.random.fork_rng([device] if device.type == "cuda" else [], enabled=bool(arguments.dropout_p)):
        if arguments.dropout_p:
            torch.cuda.set_rng_state(rng_state, device) if device.type == "cuda" else torch.set_rng_state(rng_state)
        with torch.enable_grad():
            query, key, value = (tensor.detach().requires_grad_() for tensor in (query, key, value))
            out, _lse = _bodies[name](query, key, value, (a, b, c, d), arguments)
            grad_query, grad_key, grad_value = torch.autograd.grad(out, (query, key, value), grad_out)
    return grad_query.contiguous(), grad_key.contiguous(), grad_value.contiguous()


def _forward_shapes(name: str, query: Tensor, key: Tensor, value: Tensor, a, b, c, d, *flat):
    arguments = _rebuilt(flat)
    out = query.new_empty((*query.shape[:-1], value.shape[-1]))
    shape: tuple[int, ...] = (0,)
    if arguments.return_lse:
        heads = query.shape[-2]
        shape = (query.shape[0], heads, query.shape[1]) if query.dim() == 4 else (heads, query.shape[0])
    state = torch.empty(
        16 if query.device.type == "cuda" else torch.get_rng_state().numel(), dtype=torch.uint8, device="cpu"
    )
    state = state if arguments.dropout_p else torch.empty(0, dtype=torch.uint8, device="cpu")
    return out, query.new_empty(shape, dtype=torch.float32), state


def _backward_shapes(grad_out: Tensor, rng_state: Tensor, name: str, query: Tensor, key: Tensor, value: Tensor, *rest):
    return tuple(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (query, key, value))


def _remember(ctx, inputs, output) -> None:
    name, query, key, value, a, b, c, d, *flat = inputs
    ctx.name, ctx.flat = name, flat
    ctx.save_for_backward(query, key, value, a, b, c, d, output[2])
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.set_materialize_grads(False)


def _gradients(ctx, grad_out: Tensor, _grad_lse, _grad_state):
    query, key, value, a, b, c, d, state = ctx.saved_tensors
    gradients = torch.ops.attention_dispatch.external_attention_backward(
        grad_out, state, ctx.name, query, key, value, a, b, c, d, *ctx.flat
    )
    return (None, *gradients, *[None] * (EXTRAS + len(ctx.flat)))


_library.impl("external_attention", _forward, "CompositeExplicitAutograd")
_library.impl("external_attention_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("attention_dispatch::external_attention", _forward_shapes, lib=_library)
torch.library.register_fake("attention_dispatch::external_attention_backward", _backward_shapes, lib=_library)
torch.library.register_autograd(
    "attention_dispatch::external_attention", _gradients, setup_context=_remember, lib=_library
)
