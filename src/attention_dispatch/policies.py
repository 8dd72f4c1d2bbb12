"""Policies: which part of a model gets which backend, as a value to print, to store as JSON, and to apply at once.

A policy is given to ``set_attention_backend`` in place of a request. Its parts are requests or further policies:

- :func:`modules`: by module name. :func:`ends`: the first and last blocks apart from those in between.
- :func:`roles`: self- apart from cross-attention. :func:`components`: the models of a pipeline.
- :func:`steps`: by denoising step, told with :class:`at_step`.

Example, "keep the first and the last two blocks exact":
    >>> from attention_dispatch import policies
    >>> policies.ends("native", "triton_sage", blocks=2)
    ends('native', 'triton_sage', blocks=2)
"""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .errors import InvalidCallError
from .request import Request, parse
from .steps import advance_step, at_step

__all__ = ["Policy", "advance_step", "at_step", "components", "ends", "from_json", "modules", "roles", "steps"]


@dataclass(frozen=True)
class Policy:
    """A policy; made by the functions of this module.

    Attributes:
        kind: the function that makes it.
        rules: (pattern, role, component or steps; request, policy or None), None leaving modules as they are.
        options: its other arguments.
    """

    kind: str
    rules: tuple[tuple[str, Any], ...]
    options: tuple[tuple[str, Any], ...] = ()

    def to_json(self) -> str:
        """JSON from which :func:`from_json` makes an equal policy."""
        return json.dumps(_as_data(self), indent=2)

    def __repr__(self) -> str:
        options = [f"{name}={value!r}" for name, value in self.options if value is not None]
        if self.kind in ("roles", "components"):
            rules = [f"{name}={value!r}" for name, value in self.rules]
        elif self.kind == "ends":
            rules = [repr(value) for _, value in self.rules]
        else:
            rules = [repr(dict(self.rules))]
        return f"{self.kind}({', '.join(rules + options)})"


def modules(rules: Mapping[str, Any], default: Any = None) -> Policy:
    """By module name.

    Args:
        rules: pattern to request or policy. A pattern is a glob (``"blocks.0.*"``), or, after ``"re:"``, a regular
            expression that the whole name must match. None as a value leaves the modules as they are.
        default: for modules that no pattern matches; None leaves them as they are.

    Raises, when it is applied:
        InvalidCallError: a pattern matches nothing, or two match one module and want different things.
    """
    for pattern in rules:
        matcher(pattern)
    return Policy("modules", _rules(rules), (("default", _value(default)),))


def ends(edge: Any, middle: Any, blocks: int = 2) -> Policy:
    """The first and last blocks of a model apart from those in between.

    Blocks are told apart by the first number in the names of their modules and counted over the whole model, in the
    order of ``named_modules``; a module without a number is a block of its own.

    Args:
        edge: request or policy of the first ``blocks`` and the last ``blocks`` blocks.
        middle: of the others.
    """
    if not isinstance(blocks, int) or isinstance(blocks, bool) or blocks < 1:
        raise InvalidCallError(f"blocks is a count of at least 1, got {blocks!r}.")
    return Policy("ends", (("edge", _value(edge)), ("middle", _value(middle))), (("blocks", blocks),))


def roles(**rules: Any) -> Policy:
    """By role: ``roles(self="sage", cross="native")``.

    The role is read from ``is_cross_attention`` or ``is_cross`` of a module, else from its usual names (``self_attn``,
    ``attn1``, ``cross_attn``, ``attn2``, ``encoder_attn``), else in each call: cross-attention is Sq != Sk. In the last
    case both roles need a request, not a policy.
    """
    unknown = sorted(set(rules) - {"self", "cross"})
    if unknown or not rules:
        raise InvalidCallError(f"roles takes self= and cross=, got {', '.join(unknown) or 'nothing'}.")
    return Policy("roles", _rules(rules))


def components(**rules: Any) -> Policy:
    """By model of a pipeline: ``components(transformer="sage", vae="native")``. Others are left as they are."""
    if not rules:
        raise InvalidCallError("components takes the names of a pipeline's models, such as transformer='native'.")
    return Policy("components", _rules(rules))


def steps(rules: Mapping[str, Any], total: int | None = None) -> Policy:
    """By denoising step.

    Args:
        rules: ranges as in slices to requests or policies: ``{"0:2": "native", "2:-2": "sage", "-2:": "native"}``.
            Every step belongs to exactly one range.
        total: number of steps; needed for ends that count from the last step.

    Raises:
        InvalidCallError: ranges that overlap or leave a gap, or negative ends without ``total``.
    """
    if total is not None and (not isinstance(total, int) or isinstance(total, bool) or total < 1):
        raise InvalidCallError(f"total is a count of steps of at least 1, got {total!r}.")
    policy = Policy("steps", _rules(rules), (("total", total),))
    step_ranges(policy)
    return policy


def from_json(text: str) -> Policy:
    """The policy that :meth:`Policy.to_json` wrote.

    Raises:
        InvalidCallError: not a policy. UnknownBackendError: a name that nobody registered here.
    """
    try:
        found = _from_data(json.loads(text))
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise InvalidCallError(f"this is no policy written by Policy.to_json(): {error!r}.") from error
    if not isinstance(found, Policy):
        raise InvalidCallError(f"this is the request {found!r}, not a policy.")
    return found


def step_ranges(policy: Policy) -> list[tuple[int, int | None, Any]]:
    """(start, stop or None, value) of a ``steps`` policy, in order and without gaps."""
    total = dict(policy.options)["total"]
    found = sorted(((*_range(text, total), value) for text, value in policy.rules), key=lambda part: part[0])
    position: int | None = 0
    for start, stop, _value in found:
        if start != position or (stop is not None and stop <= start):
            raise InvalidCallError(f"{policy!r}: every step must belong to exactly one range; look at step {start}.")
        position = stop
    if position is not None and (total is None or position != total):
        end = "the last range must be open, as in '8:'" if total is None else f"the last range must end at {total}"
        raise InvalidCallError(f"{policy!r}: {end}.")
    return found


def _range(text: str, total: int | None) -> tuple[int, int | None]:
    match = re.fullmatch(r"\s*(-?\d*)\s*:\s*(-?\d*)\s*", text)
    if match is None:
        raise InvalidCallError(f"a range of steps is written as a slice, such as '0:2' or '-2:', got {text!r}.")
    bounds = [int(part) if part else None for part in match.groups()]
    if total is None and any(bound is not None and bound < 0 for bound in bounds):
        raise InvalidCallError(f"{text!r} counts from the last step: pass total=, the number of steps.")
    start, stop = (bound if bound is None or bound >= 0 else bound + (total or 0) for bound in bounds)
    return start or 0, total if stop is None else stop


def matcher(pattern: str) -> Callable[[str], bool]:
    if not isinstance(pattern, str):
        raise InvalidCallError(f"a pattern is a string, got {pattern!r}.")
    if not pattern.startswith("re:"):
        return lambda name: fnmatch.fnmatchcase(name, pattern)
    try:
        expression = re.compile(pattern[3:])
    except re.error as error:
        raise InvalidCallError(f"{pattern[3:]!r} is not a regular expression: {error}.") from error
    return lambda name: expression.fullmatch(name) is not None


def _rules(rules: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple((name, _value(value)) for name, value in rules.items())


def _value(value: Any) -> Any:
    """A rule's value, validated and hashable."""
    if value is None or isinstance(value, Policy):
        return value
    parse(value)
    return tuple(str(name) for name in value) if not isinstance(value, (str, Request)) else value


def _as_data(value: Any) -> Any:
    if isinstance(value, Policy):
        rules = {name: _as_data(part) for name, part in value.rules}
        return {"policy": value.kind, "rules": rules, **{name: _as_data(option) for name, option in value.options}}
    return list(value) if isinstance(value, tuple) else value


def _from_data(data: Any) -> Any:
    if not isinstance(data, dict):
        return tuple(data) if isinstance(data, list) else data
    kind, rules = data["policy"], {name: _from_data(part) for name, part in data["rules"].items()}
    options = {name: _from_data(part) for name, part in data.items() if name not in ("policy", "rules")}
    if kind in ("modules", "steps"):
        by_rules: dict[str, Callable[..., Policy]] = {"modules": modules, "steps": steps}
        return by_rules[kind](rules, **options)
    by_name: dict[str, Callable[..., Policy]] = {"ends": ends, "roles": roles, "components": components}
    return by_name[kind](**rules, **options)
