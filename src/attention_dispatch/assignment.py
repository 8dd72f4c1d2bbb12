"""What a policy wants of each module of a model."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from .errors import InvalidCallError
from .policies import Policy, matcher, step_ranges
from .request import ROLES, Request, parse
from .scopes import Choice
from .sites import Site
from .steps import Schedule

Assignment = dict[int, Choice]
"""Index of a site to its choice. A site that is absent is left as it is."""


def assign(policy: Any, sites: Sequence[Site], component_of: Callable[[Site], str | None]) -> Assignment:
    """What a policy wants of each site. Changes nothing.

    Args:
        policy: a :class:`Policy`, a dict (later patterns override earlier ones), a request, or None.
        sites: the sites that can be routed.
        component_of: the pipeline component that a site is in; None for a bare model.

    Raises:
        InvalidCallError: conflicts, and patterns that match nothing.
        UnknownBackendError: a name nobody registered.
    """
    everything = range(len(sites))
    if isinstance(policy, Mapping):
        found: Assignment = {}
        for pattern, value in policy.items():
            found.update(_resolve(value, matching(pattern, sites, everything), sites, component_of))
        return found
    return _resolve(policy, everything, sites, component_of)


def _resolve(
    value: Any, chosen: Iterable[int], sites: Sequence[Site], component_of: Callable[[Site], str | None]
) -> Assignment:
    chosen = list(chosen)
    if value is None:
        return {}
    if not isinstance(value, Policy):
        return dict.fromkeys(chosen, parse(value))

    def resolve(part: Any, indices: Iterable[int]) -> Assignment:
        return _resolve(part, indices, sites, component_of)

    if value.kind == "modules":
        return _resolve_modules(value, chosen, sites, resolve)
    if value.kind == "ends":
        return _resolve_ends(value, chosen, sites, resolve)
    if value.kind == "roles":
        return _resolve_roles(value, chosen, sites, resolve)
    if value.kind == "steps":
        return _resolve_steps(value, chosen, sites, resolve)
    found: Assignment = {}
    known = {component_of(sites[index]) or "" for index in chosen} - {""}
    for name, part in value.rules:
        if name not in known:
            names = ", ".join(sorted(known)) or "(none: this is a model, not a pipeline)"
            raise InvalidCallError(
                f"the pipeline has no component {name!r} that computes attention. Those are: {names}."
            )
        found.update(resolve(part, [index for index in chosen if component_of(sites[index]) == name]))
    return found


_Resolve = Callable[[Any, Iterable[int]], Assignment]


def _resolve_modules(policy: Policy, chosen: list[int], sites: Sequence[Site], resolve: _Resolve) -> Assignment:
    wanted: dict[int, tuple[str, Any]] = {}
    for pattern, value in policy.rules:
        for index in matching(pattern, sites, chosen):
            before = wanted.setdefault(index, (pattern, value))
            if before[1] != value:
                raise InvalidCallError(
                    f"the patterns {before[0]!r} and {pattern!r} both match {sites[index].name!r} and want "
                    f"{before[1]!r} and {value!r}. Make one of them narrower."
                )
    found: Assignment = {}
    for _pattern, value in policy.rules:
        found.update(resolve(value, [index for index, (_, other) in wanted.items() if other == value]))
    found.update(resolve(dict(policy.options)["default"], [index for index in chosen if index not in wanted]))
    return found


def _resolve_ends(policy: Policy, chosen: list[int], sites: Sequence[Site], resolve: _Resolve) -> Assignment:
    rules, count = dict(policy.rules), dict(policy.options)["blocks"]
    blocks = list(dict.fromkeys(_block(sites[index].name) for index in chosen))
    if len(blocks) <= 2 * count:
        raise InvalidCallError(
            f"{policy!r} leaves no block in the middle: there are {len(blocks)} ({', '.join(blocks[:6])}). Use fewer "
            f"blocks, or policies.modules."
        )
    edges = {*blocks[:count], *blocks[-count:]}
    found = resolve(rules["edge"], [index for index in chosen if _block(sites[index].name) in edges])
    found.update(resolve(rules["middle"], [index for index in chosen if _block(sites[index].name) not in edges]))
    return found


def _block(name: str) -> str:
    match = re.match(r"(?:.*?\.)??\d+(?=\.|$)", name)
    return match.group() if match else name


def _resolve_roles(policy: Policy, chosen: list[int], sites: Sequence[Site], resolve: _Resolve) -> Assignment:
    rules = dict(policy.rules)
    by_length = [index for index in chosen if sites[index].cross is None]
    found: Assignment = {}
    for role, is_cross in (("self", False), ("cross", True)):
        members = [index for index in chosen if sites[index].cross is is_cross]
        if role in rules and not members and not by_length:
            raise InvalidCallError(f"{policy!r}: the model has no {role}-attention. Leave {role}= out.")
        found.update(resolve(rules.get(role), members))
    if by_length:
        both = [resolve(rules.get(role), by_length).get(by_length[0]) for role in ("self", "cross")]
        if not all(isinstance(choice, Request) for choice in both):
            names = ", ".join(sites[index].name or "(the model itself)" for index in by_length[:4])
            raise InvalidCallError(
                f"{policy!r}: only the lengths of each call tell the role of {names}; there, both self= and cross= must "
                f"be requests (put steps around roles). Or give the module a bool attribute is_cross_attention."
            )
        found.update(dict.fromkeys(by_length, both[0] if both[0] == both[1] else Request(ROLES, tuple(both))))
    return found


def _resolve_steps(policy: Policy, chosen: list[int], sites: Sequence[Site], resolve: _Resolve) -> Assignment:
    segments: dict[int, list[tuple[int, int | None, Request]]] = {index: [] for index in chosen}
    for start, stop, value in step_ranges(policy):
        part = resolve(value, chosen)
        for index in chosen:
            choice = part.get(index)
            if not isinstance(choice, Request):
                raise InvalidCallError(
                    f"{policy!r} names no backend for {sites[index].name!r} at steps {start}-"
                    f"{'' if stop is None else stop - 1}. Every step needs one, and steps cannot hold steps."
                )
            segments[index].append((start, stop, choice))
    return {index: Schedule(tuple(parts)) for index, parts in segments.items()}


def matching(pattern: str, sites: Sequence[Site], chosen: Iterable[int]) -> list[int]:
    """Those of the chosen sites whose names match.

    Raises:
        InvalidCallError: none does.
    """
    matches = matcher(pattern)
    found = [index for index in chosen if matches(sites[index].name)]
    if not found:
        names = [site.name or "(the model itself)" for site in sites]
        more = ", ..." if len(names) > 12 else ""
        raise InvalidCallError(
            f"the pattern {pattern!r} matches no attention module. They are: {', '.join(names[:12]) or '(none)'}{more}."
        )
    return found
