"""The setting of a module that hands no backend to its attention calls: two hooks set the thread's request around it.

Everything lives on the module, so that it travels with ``copy.deepcopy`` and pickling.
"""

from __future__ import annotations

import types
from typing import Any, NamedTuple

import torch.nn as nn

from .errors import InvalidCallError
from .interception import intercept, release
from .request import ROLES, Request, current

_SCOPE = "_attention_dispatch_scope"
_NESTED = "_attention_dispatch_nested"


class Schedule(NamedTuple):
    """Requests by denoising step.

    Attributes:
        segments: (first step, step after the last one or None, request), in order and without gaps.
    """

    segments: tuple[tuple[int, int | None, Request], ...]

    def at(self, step: int) -> Request | None:
        """The request of a step; None past the end."""
        for start, stop, request in self.segments:
            if start <= step and (stop is None or step < stop):
                return request
        return None

    def __str__(self) -> str:
        return ", ".join(f"{_words(start, stop)}: {request}" for start, stop, request in self.segments)


def _words(start: int, stop: int | None) -> str:
    if stop is None:
        return f"steps {start} and later"
    return f"step {start}" if stop == start + 1 else f"steps {start} to {stop - 1}"


Choice = Request | Schedule | None
"""What a module is set to; None shuts off the setting of a module around it."""

# Every schedule in use, by its key in the thread's table: at a new step each is looked up once, outside the model, so
# that a compiled model guards on the request and not on the step.
_schedules: dict[str, Schedule] = {}


class Scope:
    """The setting of one module."""

    def __init__(self, choice: Choice):
        self.handles: tuple[Any, ...] = ()
        self.choose(choice)

    def choose(self, choice: Choice) -> None:
        self.choice = choice
        self.request = choice if isinstance(choice, Request) else None
        self.schedule = None
        if isinstance(choice, Schedule):
            self.schedule = str(choice)
            _schedules[self.schedule] = choice
            schedule_for_step(current.step)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copy, or a module read from a file, is routed as the original was.
        self.__dict__.update(state)
        self.choose(self.choice)
        intercept(self)


def choice_of(module: nn.Module) -> Choice:
    """The choice set on a module by :func:`set_scope`; None when there is none."""
    scope = vars(module).get(_SCOPE)
    return None if scope is None else scope.choice


def has_scope(module: nn.Module) -> bool:
    return _SCOPE in vars(module)


def set_scope(module: nn.Module, choice: Choice) -> None:
    """Let ``choice`` count for the attention calls made while the module's forward runs."""
    scope = vars(module).get(_SCOPE)
    if scope is not None:
        scope.choose(choice)
        return
    scope = Scope(choice)
    vars(module)[_SCOPE] = scope
    enter = _enter_multihead if isinstance(module, nn.MultiheadAttention) else _enter
    scope.handles = (
        # First, so that what it undoes was done, whatever another hook raises.
        module.register_forward_pre_hook(enter, prepend=True, with_kwargs=True),
        module.register_forward_hook(_leave, always_call=True),
    )
    if "forward" not in vars(module):
        # torch.compile takes no notice of hooks added later, but checks that a module has no forward of its own.
        vars(module)["forward"] = types.MethodType(type(module).forward, module)
    intercept(scope)


def remove_scope(module: nn.Module) -> None:
    """Undo :func:`set_scope`."""
    scope = vars(module).pop(_SCOPE, None)
    if scope is not None:
        for handle in scope.handles:
            handle.remove()
        if vars(module).get("forward") == types.MethodType(type(module).forward, module):
            del vars(module)["forward"]
        release(scope)


def schedule_for_step(step: int | None) -> None:
    """Make ``step`` the thread's denoising step."""
    current.step = step
    if step is None:
        current.scheduled = {}
    else:
        found = ((key, schedule.at(step)) for key, schedule in _schedules.items())
        current.scheduled = {key: request for key, request in found if request is not None}


def _enter(module: nn.Module, args: Any, kwargs: Any) -> None:
    scope = module.__dict__[_SCOPE]
    state = current.state
    request = scope.request if scope.schedule is None else state.scheduled.get(scope.schedule)
    if request is None and scope.schedule is not None:
        raise InvalidCallError(_no_step(scope.schedule))
    state.stack.append((scope, state.model))
    state.model = request
    state.refresh()


def _leave(module: nn.Module, args: Any, output: Any) -> None:
    # Runs after an exception too, even one that another hook raised before ours was entered.
    state = current.state
    if state.stack and state.stack[-1][0] is module.__dict__.get(_SCOPE):
        state.model = state.stack.pop()[1]
        state.refresh()


def _no_step(schedule: str) -> str:
    if current.step is None:
        return (
            f"this module's backend depends on the denoising step ({schedule}), and no step is set. Run the model inside "
            f"`with attention_dispatch.policies.at_step(i):`."
        )
    return f"step {current.step} is past the end of the policy ({schedule}). Give policies.steps the true total."


def _enter_multihead(module: nn.MultiheadAttention, args: Any, kwargs: Any) -> Any:
    """``nn.MultiheadAttention`` reaches scaled_dot_product_attention only off its fused path and without weights."""
    names = ("query", "key", "value", "key_padding_mask", "need_weights")
    call = {**dict(zip(names, args)), **kwargs}
    scope = module.__dict__[_SCOPE]
    if call.get("need_weights", True) and scope.choice is not None and not _lets_torch_compute(scope.choice):
        raise InvalidCallError(
            f"nn.MultiheadAttention was called with need_weights=True (its default), for which torch computes the "
            f"attention by hand, and the module is set to {scope.choice}. Pass need_weights=False, set it to 'auto', "
            f"which allows that, or leave it out: set_attention_backend(model, ..., exclude='its.name')."
        )
    _enter(module, args, kwargs)
    if scope.choice is None or call.get("key") is None or call.get("key") is not call.get("query"):
        return None
    # The fused path is taken only when query, key and value are one object. Two objects cost a second projection.
    key = call["key"].view_as(call["key"])
    value = key if call["value"] is call["key"] else call["value"]
    changed = {"key": key, "value": value}
    return (
        tuple(changed.get(name, argument) for name, argument in zip((*names, *[""] * len(args)), args)),
        {name: changed.get(name, argument) for name, argument in kwargs.items()},
    )


def _lets_torch_compute(choice: Choice) -> bool:
    return isinstance(choice, Request) and choice.mode not in ("demand", "permission", ROLES)


def use_nested_tensors(model: nn.Module, allowed: bool) -> None:
    """Keep ``nn.TransformerEncoder`` from packing padded input into nested tensors, which only the fused path takes.

    Args:
        model: encoders with a routed module inside are changed.
        allowed: False switches packing off, True puts back what was there.
    """
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):
            if allowed and _NESTED in vars(module):
                module.use_nested_tensor = vars(module).pop(_NESTED)
            elif not allowed and _NESTED not in vars(module) and any(has_scope(part) for part in module.modules()):
                vars(module)[_NESTED] = module.use_nested_tensor
                module.use_nested_tensor = False
