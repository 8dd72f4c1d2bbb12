"""Whose wish a request was: the call's, the model's, a scope's, the environment's, or nobody's."""

from __future__ import annotations

from typing import Any, NamedTuple

from .request import current, environment_variable


class Origin(NamedTuple):
    """Whose wish a request was.

    Attributes:
        where: ``"call"``, ``"model"``, ``"scope"``, ``"environment"`` or ``"default"``.
        name: of the module that carries the setting, or of the environment variable; else empty.
    """

    where: str
    name: str = ""

    def __str__(self) -> str:
        if self.where == "model":
            return f"set on the module {self.name!r}" if self.name else "set on the model itself"
        if self.where == "environment":
            return f"set by the environment variable {self.name}"
        words = {"call": "asked for by the call", "scope": "set by `with attention_backend`"}
        return words.get(self.where, "the default: nothing was asked for")


BY_CALL = Origin("call")


def origin_of(backend: Any) -> Origin:
    """Where the request for a call of this thread comes from.

    Args:
        backend: the call's own, or None.
    """
    state = current.state
    if backend is not None:
        return BY_CALL
    if state.model is not None:
        return Origin("model", state.stack[-1][0].name)
    if state.scope is not None:
        return Origin("scope")
    variable = environment_variable()
    return Origin("environment", variable) if variable else Origin("default")
