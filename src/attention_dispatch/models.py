"""Give a model, or some of its modules, a backend of their own; and take it back exactly.

A module is a *site* if it computes attention itself. There are two kinds:

- ``"attribute"``: the module or its ``processor`` carries ``_attention_backend`` and hands it to the dispatcher with
  every call. Setting it costs nothing per call.
- ``"scope"``: its forward calls ``scaled_dot_product_attention`` or the dispatcher without saying which backend. Two
  forward hooks set the request of the thread for as long as the forward runs.
"""

from __future__ import annotations

import fnmatch
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch.nn as nn

from . import registry
from .errors import InvalidCallError
from .interception import intercept_sdpa, release_sdpa
from .request import Request, current, parse
from .sites import Site, find_sites

_MISSING = "<missing>"
_SAVED = "_attention_backend_before"
_SCOPE = "_attention_dispatch_scope"


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
    model: nn.Module,
    request: Any,
    *,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
) -> Report:
    """Route the attention of a model. The setting lives on its modules; other models and the process do not change.

    Everything is checked before anything is changed. Setting again replaces the earlier setting.

    Args:
        model: any module.
        request: a name, a sequence of names, ``"auto"``, ``"auto_quantized"``, or a dict of module-name patterns
            (``fnmatch``, as in ``"blocks.0.*"``) to requests; the last pattern that matches a module counts.
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
    if not isinstance(model, nn.Module):
        raise InvalidCallError(
            f"model must be a torch.nn.Module, got {type(model).__name__}. For a pipeline pass its transformer."
        )
    _adopt_integrations(model)
    sites = find_sites(model)
    assignment, left = _assign(sites, request, _patterns(include), _patterns(exclude))
    if not assignment:
        raise InvalidCallError(_nothing_routed(model, sites))
    for _site, wanted in assignment:
        if wanted.mode == "demand":
            registry.require(wanted.names[0])
    for site, wanted in assignment:
        _apply(site, wanted)
    return Report(tuple((site.name, str(wanted)) for site, wanted in assignment), tuple(left))


def reset_attention_backend(model: nn.Module) -> None:
    """Undo every :func:`set_attention_backend` on a model and its submodules: what was there before is there again."""
    for site in find_sites(model):
        _restore(site)


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
        return set_attention_backend(self, request, include=include, exclude=exclude)  # type: ignore[arg-type]

    def reset_attention_backend(self) -> None:
        """See :func:`attention_dispatch.reset_attention_backend`."""
        reset_attention_backend(self)  # type: ignore[arg-type]


def _patterns(value: str | Sequence[str] | None) -> tuple[str, ...] | None:
    if value is None:
        return None
    return (value,) if isinstance(value, str) else tuple(value)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _assign(
    sites: Sequence[Site], request: Any, include: tuple[str, ...] | None, exclude: tuple[str, ...] | None
) -> tuple[list[tuple[Site, Request]], list[tuple[str, str]]]:
    if isinstance(request, Mapping):
        rules = [(pattern, parse(wanted)) for pattern, wanted in request.items()]
    else:
        rules = [("*", parse(request))]
    names = [site.name for site in sites]
    for pattern in (
        *(pattern for pattern, _ in rules if isinstance(request, Mapping)),
        *(include or ()),
        *(exclude or ()),
    ):
        if sites and not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            raise InvalidCallError(
                f"the pattern {pattern!r} matches no attention module. They are: {', '.join(names[:12]) or '(none)'}"
                f"{', ...' if len(names) > 12 else ''}."
            )
    assigned, left = [], []
    for site in sites:
        if include is not None and not _matches(site.name, include):
            left.append((site.name, "not in include"))
        elif exclude is not None and _matches(site.name, exclude):
            left.append((site.name, "in exclude"))
        elif not site.routable:
            left.append((site.name, site.why))
        else:
            wanted = [rule for pattern, rule in rules if fnmatch.fnmatchcase(site.name, pattern)]
            if wanted:
                assigned.append((site, wanted[-1]))
            else:
                left.append((site.name, "no pattern matches"))
    return assigned, left


def _nothing_routed(model: nn.Module, sites: Sequence[Site]) -> str:
    name = type(model).__name__
    if sites:
        whys = "; ".join(dict.fromkeys(site.why for site in sites if site.why)) or "include/exclude leave none"
        return f"nothing of {name} was routed: {whys}."
    return (
        f"{name} has no module whose forward calls scaled_dot_product_attention or dispatch_attention_fn, so there is "
        f"nothing to route. If it computes attention by hand, call attention_dispatch.dispatch_attention_fn there."
    )


def _apply(site: Site, wanted: Request) -> None:
    if site.kind == "attribute":
        holder = site.holder
        if _SAVED not in vars(holder):
            setattr(holder, _SAVED, vars(holder).get("_attention_backend", _MISSING))
        holder._attention_backend = _spelled(wanted)
        return
    scope = vars(site.module).get(_SCOPE)
    if scope is None:
        scope = _Scope()
        scope.handles = (
            site.module.register_forward_pre_hook(_enter_scope),
            site.module.register_forward_hook(_leave_scope, always_call=True),
        )
        setattr(site.module, _SCOPE, scope)
        intercept_sdpa(site.module)
    scope.request = wanted


def _spelled(wanted: Request) -> Any:
    """A request as users and other libraries write it: a name where it is one."""
    if wanted.mode == "demand":
        return wanted.names[0]
    return wanted.names if wanted.mode == "permission" else wanted.mode


def _restore(site: Site) -> None:
    holder = site.holder
    if _SAVED in vars(holder):
        before = vars(holder).pop(_SAVED)
        if before == _MISSING:
            vars(holder).pop("_attention_backend", None)
        else:
            holder._attention_backend = before
    scope = vars(site.module).pop(_SCOPE, None)
    if scope is not None:
        for handle in scope.handles:
            handle.remove()
        release_sdpa(site.module)


class _Scope:
    """The setting of a scope site, on its module: travels with ``copy.deepcopy`` and pickling."""

    request: Request
    handles: tuple[Any, ...] = ()


def _enter_scope(module: nn.Module, args: Any) -> None:
    scope = module.__dict__[_SCOPE]
    stack = current.stack
    stack.append(current.model)
    current.model = scope.request
    current.refresh()


def _leave_scope(module: nn.Module, args: Any, output: Any) -> None:
    current.model = current.stack.pop()
    current.refresh()


def _adopt_integrations(model: nn.Module) -> None:
    """A diffusers model asks diffusers' own dispatcher, so that one has to be routed here first."""
    if "diffusers" in sys.modules and any(
        type(module).__module__.startswith("diffusers.") for module in model.modules()
    ):
        from .integrations import diffusers

        diffusers.activate()
