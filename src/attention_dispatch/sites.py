"""Find the modules of a model that compute attention, by reading the code of their forwards."""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn as nn

from .interception import is_sdpa

ENTRY_POINTS = frozenset({"scaled_dot_product_attention", "dispatch_attention_fn", "multi_head_attention_forward"})
# transformers' table of attention functions: its modules look their function up by the name in their config.
INTERFACE_TABLE = "ALL_ATTENTION_FUNCTIONS"
_MAX_DEPTH = 4

# Wrappers add a component to the names of the modules inside; users write the names they know.
_WRAPPER_PARTS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_CROSS_NAMES = frozenset(
    {"attn2", "cross_attn", "cross_attention", "crossattention", "encdecattention", "encoder_attn"}
)
_SELF_NAMES = frozenset({"attn1", "self_attn", "self_attention", "selfattention"})
_ATTENTION_CLASS = re.compile(r"Attention$|Attn$|Attention2D$")


class Site(NamedTuple):
    """A module that computes attention.

    Attributes:
        name: its name in the model, without the parts that wrappers add; empty for the model itself.
        module: the module.
        kind: ``"attribute"`` or ``"scope"``; see ``models``.
        holder: the object that carries ``_attention_backend``, for kind ``"attribute"``; else the module.
        cross: whether it is cross-attention, where its attributes or names tell; None where only lengths can.
        interface: whether it takes its attention function from transformers' table.
        routable: whether it can be given a backend; ``why`` says why not.
    """

    name: str
    module: nn.Module
    kind: str
    holder: Any
    cross: bool | None = None
    interface: bool = False
    routable: bool = True
    why: str = ""


def find_sites(model: nn.Module) -> list[Site]:
    """The sites of a model, in the order of ``named_modules``."""
    found: list[Site] = []
    decoder_layers = {
        id(module.multihead_attn) for module in model.modules() if isinstance(module, nn.TransformerDecoderLayer)
    }
    prefix = "module." if isinstance(model, nn.parallel.DistributedDataParallel) else ""
    for name, module in model.named_modules():
        site = _site(_plain_name(name.removeprefix(prefix)), module)
        if site is not None:
            found.append(site._replace(cross=True) if id(module) in decoder_layers else site)
    inside = {id(part) for site in found if site.routable for part in site.module.modules()}
    return [site for site in found if site.routable or _holds_no_other(site, inside)]


def _holds_no_other(site: Site, inside: set[int]) -> bool:
    return not any(id(part) in inside for part in site.module.modules())


def _plain_name(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPER_PARTS)


def _site(name: str, module: nn.Module) -> Site | None:
    cls: Any = type(module)
    cross = _cross(name, module)
    processor = getattr(module, "processor", None)
    for holder in (processor, module):
        if (
            holder is not None
            and not callable(getattr(holder, "_attention_backend", None))
            and hasattr(holder, "_attention_backend")
        ):
            if isinstance(holder, nn.Module) and holder is not module:
                continue  # a processor that is a module is visited under its own name
            return Site(name, module, "attribute", holder, cross, _uses_table(cls))
    if _uses_table(cls) and getattr(module, "config", None) is not None:
        return Site(name, module, "attribute", module, cross, interface=True)
    if isinstance(module, torch.jit.ScriptModule):
        if "attention" in module.original_name.lower():
            return Site(
                name, module, "scope", module, cross, routable=False, why="it is scripted: hooks cannot run in it"
            )
        return None
    if calls_attention(cls.forward, cls) or _calls_through_part(module):
        if _runs_later(cls):
            why = (
                "its forward is a coroutine or generator, which runs after its hooks have; use attention_backend in it"
            )
            return Site(name, module, "scope", module, cross, routable=False, why=why)
        return Site(name, module, "scope", module, cross)
    return _unreachable(name, module, cross)


def _runs_later(cls: Any) -> bool:
    flags = getattr(getattr(inspect.unwrap(cls.forward), "__code__", None), "co_flags", 0)
    return bool(flags & (inspect.CO_COROUTINE | inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR))


def _calls_through_part(module: nn.Module) -> bool:
    """Whether a plain object that the module holds, such as a processor, computes its attention."""
    for part in vars(module).values():
        kind: Any = type(part)
        call = inspect.getattr_static(kind, "__call__", None)
        if isinstance(call, types.FunctionType) and not isinstance(part, nn.Module) and calls_attention(call, kind):
            return True
    return False


def _unreachable(name: str, module: nn.Module, cross: bool | None) -> Site | None:
    for attribute, value in (*vars(type(module)).items(), *vars(module).items()):
        if is_sdpa(value) or is_sdpa(getattr(value, "__func__", None)):
            why = (
                f"it keeps torch's function in its attribute {attribute!r}; call F.scaled_dot_product_attention instead"
            )
            return Site(name, module, "scope", module, cross, routable=False, why=why)
    if _ATTENTION_CLASS.search(type(module).__name__):
        why = (
            "its forward calls no attention function; if it computes attention by hand, call "
            "attention_dispatch.dispatch_attention_fn there"
        )
        return Site(name, module, "scope", module, cross, routable=False, why=why)
    return None


def _cross(name: str, module: nn.Module) -> bool | None:
    for attribute in ("is_cross_attention", "is_cross"):
        value = getattr(module, attribute, None)
        if isinstance(value, bool):
            return value
    last, kind = name.rpartition(".")[2].lower(), type(module).__name__
    if last in _CROSS_NAMES or "CrossAttention" in kind:
        return True
    return False if last in _SELF_NAMES or "SelfAttention" in kind else None


@lru_cache(maxsize=4096)
def _uses_table(cls: type) -> bool:
    forward = inspect.unwrap(cls.forward)  # type: ignore[attr-defined]
    return isinstance(forward, types.FunctionType) and INTERFACE_TABLE in _names(forward.__code__)


@lru_cache(maxsize=4096)
def calls_attention(function: Any, owner: type | None = None) -> bool:
    """Whether a function names an attention entry point, or one of its own that it calls does.

    Args:
        function: a function or method.
        owner: the class whose methods it reaches through ``self``.
    """
    return _reaches(function, owner, _MAX_DEPTH, set())


def _reaches(function: Any, owner: type | None, depth: int, seen: set[Any]) -> bool:
    function = inspect.unwrap(function)
    code = getattr(function, "__code__", None)
    if code is None or code in seen:
        return False
    seen.add(code)
    scope = function.__globals__
    names = set(_names(code))
    if names & ENTRY_POINTS or any(is_sdpa(scope.get(name)) for name in names):
        return True
    return depth > 0 and any(_reaches(callee, owner, depth - 1, seen) for callee in _callees(scope, names, owner))


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _callees(scope: dict[str, Any], names: set[str], owner: type | None) -> Iterator[Any]:
    """Functions of its own package that a function names, directly or as ``module.function``, and its class's methods."""
    package = scope.get("__name__", "").partition(".")[0]
    homes = [scope, *(vars(found) for name in names if _is_own_module(found := scope.get(name), package))]
    for name in names:
        for home in homes:
            found = home.get(name)
            if isinstance(found, types.FunctionType) and found.__module__.partition(".")[0] == package:
                yield found
        method = inspect.getattr_static(owner, name, None) if owner is not None else None
        method = getattr(method, "__func__", method)
        if isinstance(method, types.FunctionType) and method.__module__ != nn.Module.__module__:
            yield method


def _is_own_module(found: Any, package: str) -> bool:
    return isinstance(found, types.ModuleType) and found.__name__.partition(".")[0] == package
