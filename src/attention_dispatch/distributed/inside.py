"""Context parallelism for the attention calls that a module makes without passing a ``parallel_config``.

Two hooks around the module's forward tell the thread's calls which ranks share the sequence.
"""

from __future__ import annotations

from typing import Any

import torch.nn as nn

from ..api import request_for
from ..call import AttentionOutput
from ..interception import intercept, intercept_everywhere, release
from ..request import current
from .config import ContextParallel

_INSIDE = "_attention_dispatch_parallel"


class Inside:
    """The setting of one module."""

    def __init__(self, parallel: ContextParallel):
        self.parallel = parallel
        self.handles: tuple[Any, ...] = ()


def put_inside(module: nn.Module, parallel: ContextParallel) -> None:
    """Let ``parallel`` count for the attention calls made while the module's forward runs."""
    known = vars(module).get(_INSIDE)
    if known is not None:
        known.parallel = parallel
        return
    inside = Inside(parallel)
    vars(module)[_INSIDE] = inside
    inside.handles = (
        # Entered after and left before the module's setting of a backend, whenever that was made.
        module.register_forward_pre_hook(_enter),
        module.register_forward_hook(_leave, prepend=True, always_call=True),
    )
    intercept(inside)
    intercept_everywhere()


def take_out(module: nn.Module) -> None:
    """Undo :func:`put_inside`."""
    inside = vars(module).pop(_INSIDE, None)
    if inside is not None:
        for handle in inside.handles:
            handle.remove()
        release(inside)


def _unchanged(call: Any, spec: Any, request: Any, plan: Any, output: AttentionOutput) -> AttentionOutput:
    return output


def _enter(module: nn.Module, args: Any) -> None:
    inside, state = module.__dict__[_INSIDE], current.state
    fields = state.fields
    fields.setdefault("parallel_stack", []).append(
        (inside, fields.get("parallel"), fields["model"], fields["observer"])
    )
    # A setting of its own, so that calls of unrouted modules are routed too; and an observer, so that none of them takes
    # the way of calls outside.
    fields["model"] = request_for(None)
    fields["parallel"] = inside.parallel
    if fields["observer"] is None:
        fields["observer"] = _unchanged
    state.refresh()


def _leave(module: nn.Module, args: Any, output: Any) -> None:
    # Runs after an exception too, even one that another hook raised before ours was entered.
    state = current.state
    stack = state.fields.get("parallel_stack")
    if stack and stack[-1][0] is module.__dict__.get(_INSIDE):
        _, parallel, model, observer = stack.pop()
        state.fields["parallel"], state.fields["model"], state.fields["observer"] = parallel, model, observer
        state.refresh()
