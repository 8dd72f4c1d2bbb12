"""The setting of a module that hands no backend to its attention calls: two hooks set the thread's request around it.

Everything lives on the module, so that it travels with ``copy.deepcopy`` and pickling.
"""

from __future__ import annotations

import inspect
import types
import weakref
from typing import Any

import torch.nn as nn

from .errors import InvalidCallError
from .interception import intercept, release
from .request import ROLES, Request, current, of_all_threads
from .steps import Schedule, enlist, no_step

_SCOPE = "_attention_dispatch_scope"
_NESTED = "_attention_dispatch_nested"


Choice = Request | Schedule | None
"""What a module is set to; None shuts off the setting of a module around it."""


class Scope:
    """The setting of one module, which ``name`` is the name of in the model that was set."""

    def __init__(self, choice: Choice, name: str):
        self.handles: tuple[Any, ...] = ()
        self.choose(choice, name)

    def choose(self, choice: Choice, name: str) -> None:
        self.choice, self.name = choice, name
        self.request = choice if isinstance(choice, Request) else None
        self.schedule = enlist(choice) if isinstance(choice, Schedule) else None

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copy, or a module read from a file, is routed as the original was.
        self.__dict__.update(state)
        self.choose(self.choice, self.name)
        intercept(self)


class _OwnForward:
    """The forward of a module's class, as an attribute of the module.

    torch.compile (2.13) takes no notice of hooks that are added after it compiled a module, but checks that the module
    has no forward of its own. A bound method would be one too, and keep the module alive.
    """

    def __init__(self, module: nn.Module):
        self.module = weakref.ref(module)
        # Looked up here: torch.compile cannot look it up on classes that a library allows in its graphs.
        self.function: Any = type(module).forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self.module(), *args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(types.MethodType(self.function, self.module()))

    def __deepcopy__(self, memo: dict[int, Any]) -> _OwnForward:
        module: Any = self.module()
        return _OwnForward(memo.get(id(module), module))

    def __reduce__(self) -> tuple[Any, ...]:
        return _OwnForward, (self.module(),)


def choice_of(module: nn.Module) -> Choice:
    """The choice set on a module by :func:`set_scope`; None when there is none."""
    scope = vars(module).get(_SCOPE)
    return None if scope is None else scope.choice


def setting_of(module: nn.Module) -> tuple[Choice, str] | None:
    """What to give to :func:`set_scope` to have the present setting again; None when there is none."""
    scope = vars(module).get(_SCOPE)
    return None if scope is None else (scope.choice, scope.name)


def has_scope(module: nn.Module) -> bool:
    return _SCOPE in vars(module)


def set_scope(module: nn.Module, choice: Choice, name: str = "") -> None:
    """Let ``choice`` count for the attention calls made while the module's forward runs."""
    scope = vars(module).get(_SCOPE)
    if scope is not None:
        scope.choose(choice, name)
        return
    scope = Scope(choice, name)
    vars(module)[_SCOPE] = scope
    enter = _enter_multihead if isinstance(module, nn.MultiheadAttention) else _enter
    scope.handles = (
        # First, so that what it undoes was done, whatever another hook raises.
        module.register_forward_pre_hook(enter, prepend=True, with_kwargs=True),
        module.register_forward_hook(_leave, always_call=True),
    )
    if "forward" not in vars(module):
        vars(module)["forward"] = _OwnForward(module)
    intercept(scope)


def remove_scope(module: nn.Module) -> None:
    """Undo :func:`set_scope`."""
    scope = vars(module).pop(_SCOPE, None)
    if scope is not None:
        for handle in scope.handles:
            handle.remove()
        if isinstance(vars(module).get("forward"), _OwnForward):
            del vars(module)["forward"]
        _end(scope)
        release(scope)


def _end(scope: Scope) -> None:
    """Take a scope off every thread that runs its module's forward just now: the hook that would do so is gone."""
    for state in of_all_threads():
        stack = state.stack
        for index in reversed(range(len(stack))):
            if stack[index][0] is scope:
                outer = stack.pop(index)[1]
                if index < len(stack):
                    stack[index] = (stack[index][0], outer)
                else:
                    state.model = outer
                    state.refresh()


def _enter(module: nn.Module, args: Any, kwargs: Any) -> None:
    scope = module.__dict__[_SCOPE]
    forward = module.__dict__.get("forward")
    if type(forward) is _OwnForward and forward.module() is not module:
        raise InvalidCallError(
            f"this {type(module).__name__} is a shallow copy of a routed module (copy.copy, nn.DataParallel), whose forward "
            f"would run instead. Use copy.deepcopy or DistributedDataParallel, or set the backend after copying."
        )
    state = current.state
    request = scope.request if scope.schedule is None else state.scheduled.get(scope.schedule)
    if request is None and scope.schedule is not None:
        raise InvalidCallError(no_step(scope.schedule))
    state.stack.append((scope, state.model))
    state.model = request
    state.refresh()


def _leave(module: nn.Module, args: Any, output: Any) -> None:
    # Runs after an exception too, even one that another hook raised before ours was entered.
    state = current.state
    if state.stack and state.stack[-1][0] is module.__dict__.get(_SCOPE):
        state.model = state.stack.pop()[1]
        state.refresh()


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
