"""Change the settings of modules: all of them or none, and back exactly."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch.nn as nn

from .errors import InvalidCallError
from .interception import intercept_everywhere
from .origin import Origin
from .request import ROLES, Request, current, parsed
from .scopes import Choice, choice_of, has_scope, remove_scope, set_scope, setting_of, use_nested_tensors
from .sites import Site
from .steps import Schedule, no_step

_MISSING = "<missing>"
# On the object that carries the attribute: (its value before, the name of the module).
_SAVED = "_attention_backend_before"


def setting(site: Site) -> Any:
    """What a site is set to; None if nothing."""
    if has_scope(site.module):
        return choice_of(site.module)
    return vars(site.holder).get("_attention_backend") if site.kind == "attribute" else None


def request_in(module: nn.Module) -> tuple[Request, Origin] | None:
    """What counts for attention calls in a module's forward and who set it; None where the module has no setting.

    Raises:
        InvalidCallError: the module has no request at the present denoising step.
    """
    scope = setting_of(module)
    if scope is not None:
        choice, name = scope
        if isinstance(choice, Schedule):
            request = None if current.step is None else choice.at(current.step)
            if request is None:
                raise InvalidCallError(no_step(str(choice)))
            choice = request
        return None if choice is None else (choice, Origin("model", name))
    for holder in (getattr(module, "processor", None), module):
        wanted = getattr(holder, "_attention_backend", None)
        if wanted is not None and not callable(wanted):
            _before, name = vars(holder).get(_SAVED, ("", type(module).__name__))
            return parsed(wanted), Origin("model", name)
    return None


def apply(parts: Sequence[nn.Module], assignment: Sequence[tuple[Site, Choice]], sites: Sequence[Site]) -> None:
    """Give sites their choices.

    Args:
        parts: the model, or the models of a pipeline.
        assignment: the sites to set. sites: all sites of ``parts``.
    """
    before = [(site, setting_of(site.module), dict(vars(site.holder))) for site in sites]
    try:
        for site, choice in assignment:
            _set(site, choice)
        _shield(sites, {id(site.module) for site, _ in assignment})
        for part in parts:
            use_nested_tensors(part, False)
        intercept_everywhere()
        for integration in loaded("transformers"):
            integration.adopt(parts, [site.module for site, _ in assignment if site.interface])
    except BaseException:
        for site, scope, attributes in before:
            if scope is None:
                remove_scope(site.module)
            else:
                set_scope(site.module, *scope)
            for name in ("_attention_backend", _SAVED):
                vars(site.holder).pop(name, None)
                if name in attributes:
                    vars(site.holder)[name] = attributes[name]
        for part in parts:
            use_nested_tensors(part, True)
            use_nested_tensors(part, False)
        raise


def _set(site: Site, choice: Choice) -> None:
    fixed = isinstance(choice, Request) and choice.mode != ROLES
    if site.kind == "attribute":
        holder = vars(site.holder)
        before, _name = holder.get(_SAVED) or (holder.get("_attention_backend", _MISSING), "")
        holder[_SAVED] = (before, site.name)
        holder["_attention_backend"] = _spelled(choice) if fixed else None
        if fixed:
            remove_scope(site.module)
            return
    set_scope(site.module, choice, site.name)


def _shield(sites: Sequence[Site], assigned: set[int]) -> None:
    """Modules that were left, but run inside the forward of one that was not, keep out of its setting."""
    outer = [site for site in sites if id(site.module) in assigned and has_scope(site.module)]
    covered = {id(part) for site in outer for part in site.module.modules() if part is not site.module}
    for site in sites:
        if id(site.module) in covered and id(site.module) not in assigned and not has_scope(site.module):
            set_scope(site.module, None, site.name)


def _spelled(wanted: Any) -> Any:
    """A request as users and other libraries write it: a name where it is one."""
    if wanted.mode == "demand":
        return wanted.names[0]
    return wanted.names if wanted.mode == "permission" else wanted.mode


def restore(site: Site) -> None:
    """Undo what :func:`apply` did to a site."""
    holder = vars(site.holder)
    if _SAVED in holder:
        before, _name = holder.pop(_SAVED)
        holder.pop("_attention_backend", None)
        if before != _MISSING:
            holder["_attention_backend"] = before
    remove_scope(site.module)


def loaded(name: str) -> Iterator[Any]:
    """The integration of that name, if it was imported."""
    module = sys.modules.get(f"attention_dispatch.integrations.{name}")
    if module is not None:
        yield module
