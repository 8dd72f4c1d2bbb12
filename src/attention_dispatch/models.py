"""Give a model, or some of its modules, a backend of their own; and take it back exactly.

A module is a *site* if it computes attention itself. There are two kinds:

- ``"attribute"``: the module or its ``processor`` carries ``_attention_backend`` and hands it to the dispatcher with
  every call. Setting it costs nothing per call.
- ``"scope"``: its forward calls ``scaled_dot_product_attention`` or the dispatcher without saying which backend. Two
  forward hooks set the request of the thread for as long as the forward runs.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch.nn as nn

from . import registry
from .assignment import assign, matching
from .errors import InvalidCallError
from .policies import matcher
from .request import ROLES, Request
from .routing import apply, loaded, restore, setting
from .scopes import Choice, use_nested_tensors
from .sites import Site, find_sites
from .steps import Schedule


class Report(NamedTuple):
    """What :func:`set_attention_backend` did.

    Attributes:
        routed: (module name, request) of every module that now has a setting.
        left: (module name, why it was left alone).
    """

    routed: tuple[tuple[str, str], ...]
    left: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        lines = [f"{len(self.routed)} attention modules routed, {len(self.left)} left"]
        lines += [f"  {name or '(the model itself)'} -> {request}" for name, request in self.routed]
        lines += [f"  {name or '(the model itself)'} left: {why}" for name, why in self.left]
        return "\n".join(lines)


def set_attention_backend(
    model: Any,
    request: Any,
    *,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
) -> Report:
    """Route the attention of a model. The setting lives on its modules; other models and the process do not change.

    Everything is checked before anything is changed. Setting again replaces the earlier setting of the modules it
    names; others keep theirs.

    Args:
        model: any module; or a pipeline, an object whose ``components`` is a dict that holds modules. A pipeline's
            text encoders and other models that are not diffusers' own are routed only by ``policies.components``.
        request: a name, a sequence of names, ``"auto"``, ``"auto_quantized"``, a policy (see ``policies``), or a dict
            of module-name patterns, as in ``policies.modules``, of which the last that matches a module counts.
        include, exclude: patterns that narrow the modules down.

    Returns:
        A :class:`Report` of modules routed and left.

    Raises:
        UnknownBackendError: a name nobody registered.
        BackendUnavailableError: a single name whose backend cannot be used on this machine.
        InvalidCallError: no module to route, or a pattern that matches none.

    Example:
        >>> import torch, attention_dispatch as ad
        >>> model = torch.nn.TransformerEncoderLayer(32, 4, batch_first=True)
        >>> print(ad.set_attention_backend(model, "native"))
        1 attention modules routed, 0 left
          self_attn -> 'native'
        >>> ad.reset_attention_backend(model)
    """
    parts = list(_parts(model))
    sites: list[Site] = []
    component_of: dict[int, str] = {}
    for component, part in parts:
        _adopt_integrations(part)
        for site in find_sites(part):
            name = f"{component}.{site.name}".strip(".") if component else site.name
            sites.append(site._replace(name=name))
            component_of[id(site.module)] = component
    assignment, left = _assign(model, sites, request, include, exclude, component_of)
    assignment, refused = _accepted(assignment)
    _check(assignment)
    left += [(site.name, _keeps(site, why)) for site, why in _left(sites, assignment, refused, include, exclude)]
    apply([part for _, part in parts], assignment, sites)
    return Report(tuple((site.name, str(choice)) for site, choice in assignment), tuple(left))


def reset_attention_backend(model: Any) -> None:
    """Undo every :func:`set_attention_backend` on a model and its submodules: what was there before is there again."""
    for _component, part in _parts(model):
        for site in find_sites(part):
            restore(site)
        use_nested_tensors(part, True)
        for integration in loaded("transformers"):
            integration.release(part)


class AttentionModelMixin:
    """Adds ``set_attention_backend`` and ``reset_attention_backend`` to a model class.

    Example:
        >>> import torch, attention_dispatch as ad
        >>> class Block(torch.nn.Module, ad.AttentionModelMixin):
        ...     def forward(self, x):
        ...         return ad.dispatch_attention_fn(x, x, x)
        >>> block = Block()
        >>> report = block.set_attention_backend("reference")
        >>> report.routed
        (('', "'reference'"),)
    """

    def set_attention_backend(
        self, request: Any, *, include: str | Sequence[str] | None = None, exclude: str | Sequence[str] | None = None
    ) -> Report:
        """See :func:`attention_dispatch.set_attention_backend`."""
        return set_attention_backend(self, request, include=include, exclude=exclude)

    def reset_attention_backend(self) -> None:
        """See :func:`attention_dispatch.reset_attention_backend`."""
        reset_attention_backend(self)


def _parts(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """(component name, module): the model itself under the name ``""``, or the modules of a pipeline."""
    if isinstance(model, nn.Module):
        yield "", model
        return
    components = getattr(model, "components", None)
    if not isinstance(components, dict):
        raise InvalidCallError(
            f"model must be a torch.nn.Module, or a pipeline with a dict of components, got {type(model).__name__}."
        )
    for name, component in components.items():
        if isinstance(component, nn.Module):
            yield name, component


def _assign(
    model: Any,
    sites: Sequence[Site],
    request: Any,
    include: str | Sequence[str] | None,
    exclude: str | Sequence[str] | None,
    component_of: dict[int, str],
) -> tuple[list[tuple[Site, Choice]], list[tuple[str, str]]]:
    """The sites to set with their choices, and what is left before any choice is made."""
    routable = [site for site in sites if site.routable]
    left = [(site.name, site.why) for site in sites if not site.routable]
    if not isinstance(model, nn.Module) and getattr(request, "kind", "") != "components":
        foreign = [site for site in routable if not _is_own_component(model, component_of[id(site.module)])]
        left += [(site.name, "not a diffusers model: name it in policies.components") for site in foreign]
        routable = [site for site in routable if site not in foreign]
    for pattern in (*_patterns(include), *_patterns(exclude)):
        matching(pattern, routable, range(len(routable)))
    narrowed = [site for site in routable if not _outside(site, include, exclude)]
    wanted = assign(request, narrowed, lambda site: component_of[id(site.module)] or None)
    if not wanted:
        raise InvalidCallError(_nothing_routed(model, sites))
    return [(narrowed[index], choice) for index, choice in sorted(wanted.items())], left


def _accepted(
    assignment: Sequence[tuple[Site, Choice]],
) -> tuple[list[tuple[Site, Choice]], dict[int, str]]:
    """The assignment without modules that would refuse their request when they run; and, by module, why they would."""
    refused: dict[int, str] = {}
    for integration in loaded("diffusers"):
        for site, choice in assignment:
            if why := integration.refusal(site.holder, choice):
                refused[id(site.module)] = why
    accepted = [(site, choice) for site, choice in assignment if id(site.module) not in refused]
    if not accepted:
        raise InvalidCallError(f"nothing was routed: each attention module of it {next(iter(refused.values()))}.")
    return accepted, refused


def _is_own_component(pipeline: Any, component: str) -> bool:
    own = type(pipeline.components[component]).__module__.partition(".")[0]
    return own == "diffusers" or type(pipeline).__module__.partition(".")[0] != "diffusers"


def _patterns(value: str | Sequence[str] | None) -> tuple[str, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, str) else tuple(value)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(matcher(pattern)(name) for pattern in patterns)


def _outside(site: Site, include: str | Sequence[str] | None, exclude: str | Sequence[str] | None) -> str:
    """Why a site is not among those asked for; empty if it is."""
    if include is not None and not _matches(site.name, _patterns(include)):
        return "not in include"
    return "in exclude" if _matches(site.name, _patterns(exclude)) else ""


def _left(
    sites: Sequence[Site],
    assignment: Sequence[tuple[Site, Choice]],
    refused: dict[int, str],
    include: str | Sequence[str] | None,
    exclude: str | Sequence[str] | None,
) -> Iterator[tuple[Site, str]]:
    assigned = {id(site.module) for site, _ in assignment}
    for site in sites:
        if site.routable and id(site.module) not in assigned:
            why = refused.get(id(site.module)) or _outside(site, include, exclude)
            yield site, why or "no pattern matches"


def _keeps(site: Site, why: str) -> str:
    choice = setting(site)
    if choice is None:
        return why
    return f"{why}; keeps {choice!r}" if isinstance(choice, str) else f"{why}; keeps {choice}"


def _nothing_routed(model: Any, sites: Sequence[Site]) -> str:
    name = type(model).__name__
    if any(site.routable for site in sites):
        return f"nothing of {name} was routed: include, exclude or the policy leave none of its attention modules."
    if sites:
        return f"nothing of {name} was routed: {'; '.join(dict.fromkeys(site.why for site in sites))}."
    return (
        f"{name} has no module whose forward calls scaled_dot_product_attention or dispatch_attention_fn, so there is "
        f"nothing to route. If it computes attention by hand, call attention_dispatch.dispatch_attention_fn there."
    )


def _check(assignment: Sequence[tuple[Site, Choice]]) -> None:
    """Raise for backends that cannot be used here, and for one object that would get two settings."""
    holders: dict[int, tuple[Site, Choice]] = {}
    for site, choice in assignment:
        for request in _requests(choice):
            if request.mode == "demand":
                registry.require(request.names[0])
        other, before = holders.setdefault(id(site.holder), (site, choice))
        if before != choice:
            raise InvalidCallError(
                f"{other.name!r} and {site.name!r} share one {type(site.holder).__name__}, so they cannot be set to "
                f"{before} and {choice}. Give each its own, or set both alike."
            )


def _requests(choice: Choice) -> Iterator[Request]:
    if isinstance(choice, Schedule):
        for _start, _stop, request in choice.segments:
            yield from _requests(request)
    elif isinstance(choice, Request):
        if choice.mode == ROLES:
            yield from choice.names
        else:
            yield choice


def _adopt_integrations(model: nn.Module) -> None:
    """Models of a library that keeps attention functions of its own need that library routed here first."""
    homes = {type(module).__module__.partition(".")[0] for module in model.modules()}
    if "diffusers" in homes:
        from .integrations import diffusers

        diffusers.activate()
    if "transformers" in sys.modules and any(site.interface for site in find_sites(model)):
        from .integrations import transformers

        transformers.activate()
