"""Find the modules of a model that compute attention, by reading the code of their forwards."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch.nn as nn

ENTRY_POINTS = frozenset({"scaled_dot_product_attention", "dispatch_attention_fn", "multi_head_attention_forward"})
_MAX_DEPTH = 3


class Site(NamedTuple):
    """A module that computes attention.

    Attributes:
        name: its name in the model; empty for the model itself.
        module: the module.
        kind: ``"attribute"`` or ``"scope"``; see ``models``.
        holder: the object that carries ``_attention_backend``, for kind ``"attribute"``; else the module.
        routable: whether it can be given a backend; ``why`` says why not.
    """

    name: str
    module: nn.Module
    kind: str
    holder: Any
    routable: bool = True
    why: str = ""


def find_sites(model: nn.Module) -> list[Site]:
    """The sites of a model, in the order of ``named_modules``."""
    return [site for name, module in model.named_modules() if (site := _site(name, module)) is not None]


def _site(name: str, module: nn.Module) -> Site | None:
    processor = getattr(module, "processor", None)
    for holder in (processor, module):
        if (
            holder is not None
            and not callable(getattr(holder, "_attention_backend", None))
            and hasattr(holder, "_attention_backend")
        ):
            if isinstance(holder, nn.Module) and holder is not module:
                continue  # a processor that is a module is visited under its own name
            return Site(name, module, "attribute", holder)
    if calls_attention(type(module).forward):
        return Site(name, module, "scope", module)
    if processor is not None and not isinstance(processor, nn.Module) and calls_attention(type(processor).__call__):
        return Site(name, module, "scope", module)
    return None


@lru_cache(maxsize=4096)
def calls_attention(function: Callable[..., Any]) -> bool:
    """Whether a function, or a plain function or method of its own that it names, names an attention entry point."""
    return _reaches(function, _MAX_DEPTH, set())


def _reaches(function: Any, depth: int, seen: set[Any]) -> bool:
    code = getattr(function, "__code__", None)
    if code is None or code in seen:
        return False
    seen.add(code)
    if any(name in ENTRY_POINTS for name in _names(code)):
        return True
    return depth > 0 and any(_reaches(callee, depth - 1, seen) for callee in _callees(function))


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _callees(function: Any) -> Iterator[Any]:
    """Python functions that a function names as globals of its own package, or as methods of its own class."""
    scope = function.__globals__
    package = scope.get("__name__", "").partition(".")[0]
    owner = scope.get(function.__qualname__.partition(".")[0]) if "." in function.__qualname__ else None
    for name in _names(function.__code__):
        found = scope.get(name)
        if isinstance(found, types.FunctionType) and found.__module__.partition(".")[0] == package:
            yield found
        method = getattr(owner, name, None) if owner is not None else None
        if isinstance(method, types.FunctionType):
            yield method
