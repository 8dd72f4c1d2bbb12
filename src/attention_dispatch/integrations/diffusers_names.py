"""This library's backends as members of diffusers' enum and registry, which some of its code looks names up in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers.models import attention_dispatch as upstream

from .. import api, registry

_upstream_registry = upstream._AttentionBackendRegistry
_added: dict[str, Any] = {}


def member_for_several(cls: Any, value: Any) -> Any:
    """The member for a request of several names: code that asks for one takes the path that any backend can follow."""
    return cls.NATIVE if isinstance(value, tuple) else None


def add_and_remove_names() -> None:
    """Make this library's names members of diffusers' enum, which some of its code converts names to."""
    wanted = {"auto", "auto_quantized", *registry.names()}
    for name in [name for name in _added if name not in wanted]:
        _remove_name(name)
    for name in sorted(wanted - {member.value for member in upstream.AttentionBackendName}):
        _add_name(name)


def remove_names() -> None:
    """Leave diffusers with its own names."""
    for name in list(_added):
        _remove_name(name)


def _add_name(name: str) -> None:
    enum: Any = upstream.AttentionBackendName
    label = name.upper()
    member = str.__new__(enum, name)
    member._name_, member._value_ = label, name
    enum._member_map_[label] = member
    enum._value2member_map_[name] = member
    enum._member_names_.append(label)
    _upstream_registry.register(member)(_backend_function(name))
    _added[name] = member


def _remove_name(name: str) -> None:
    enum: Any = upstream.AttentionBackendName
    member = _added.pop(name)
    del enum._member_map_[member._name_]
    del enum._value2member_map_[name]
    enum._member_names_.remove(member._name_)
    for table in (
        _upstream_registry._backends,
        _upstream_registry._constraints,
        _upstream_registry._supported_arg_names,
    ):
        table.pop(member, None)


def _backend_function(name: str) -> Callable[..., Any]:
    """diffusers' view of a backend. It reads the parameters from the signature, so all are spelled out."""

    def run(
        query: Any,
        key: Any,
        value: Any,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        return_lse: bool = False,
        window_size: Any = None,
        softcap: float = 0.0,
        deterministic: bool = False,
        _parallel_config: Any = None,
    ) -> Any:
        options = {
            "return_lse": return_lse,
            "window_size": window_size,
            "softcap": softcap,
            "deterministic": deterministic,
        }
        return api.dispatch_attention_fn(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa,
            {option: setting for option, setting in options.items() if setting}, backend=name, parallel_config=_parallel_config,
        )  # fmt: skip

    return run
