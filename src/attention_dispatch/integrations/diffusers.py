"""Hugging Face diffusers (>= 0.42): after ``import attention_dispatch.integrations.diffusers``, its documented calls
``model.set_attention_backend(name)``, ``model.reset_attention_backend()`` and ``with attention_backend(name)`` route
through this library, in models that use diffusers' dispatcher and in VAEs and older processors that call
``F.scaled_dot_product_attention``.

https://huggingface.co/docs/diffusers/optimization/attention_backends
"""

from __future__ import annotations

import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import diffusers
import torch.nn as nn
import torch.nn.functional as F
from diffusers.models import attention_dispatch as upstream
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.modeling_utils import ModelMixin

from .. import models, registry
from ..api import dispatch_attention_fn
from ..errors import InvalidCallError
from ..interception import any_rank_sdpa
from ..models import Report
from ..request import attention_backend

__all__ = ["activate", "deactivate", "install", "uninstall"]

_MISSING = object()
_lock = threading.RLock()
# (object, attribute, value before) of everything replaced, in order.
_replaced: list[tuple[Any, str, Any]] = []
_added_names: list[str] = []
_installed: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def _sdpa(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """What diffusers' own files see as ``F.scaled_dot_product_attention``; layout BHSD."""
    return any_rank_sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)


def _functional() -> types.ModuleType:
    """A copy of ``torch.nn.functional`` whose attention is routed: diffusers' files name it ``F``, other code keeps torch's."""
    routed = types.ModuleType("torch.nn.functional")
    routed.__dict__.update(F.__dict__)
    routed.scaled_dot_product_attention = _sdpa  # type: ignore[attr-defined]
    return routed


_routed_functional = _functional()
_upstream_dispatch = upstream.dispatch_attention_fn
_upstream_scope = upstream.attention_backend
_upstream_init = ModelMixin.__init__


def activate() -> None:
    """Route diffusers through this library; done by importing this module. Calling it twice is the same as once.

    Raises:
        InvalidCallError: this diffusers lacks a function that has to be replaced.
    """
    with _lock:
        if _replaced:
            return
        for name in ("_backends", "_supported_arg_names", "_constraints", "_supports_context_parallel"):
            if not hasattr(upstream._AttentionBackendRegistry, name):
                raise InvalidCallError(
                    f"diffusers {diffusers.__version__} has no attention registry with {name!r}, so it cannot be routed. "
                    f"Install a tested version: pip install 'diffusers>=0.42,<0.43'."
                )
        _replace(ModelMixin, "set_attention_backend", _set_on_model)
        _replace(ModelMixin, "reset_attention_backend", _reset_on_model)
        _replace(AttentionModuleMixin, "set_attention_backend", _set_on_module)
        _replace(ModelMixin, "__init__", _init_and_route)
        _add_names()
        _route_loaded_modules()


def deactivate() -> None:
    """Put back everything that :func:`activate` replaced. Settings of models stay; see :func:`uninstall`."""
    with _lock:
        for name, module in list(sys.modules.items()):
            for attribute, ours, theirs in _rebindings():
                if name.startswith("diffusers") and isinstance(module, types.ModuleType) and vars(module).get(attribute) is ours:
                    setattr(module, attribute, theirs)
        while _replaced:
            owner, attribute, before = _replaced.pop()
            if before is _MISSING:
                delattr(owner, attribute)
            else:
                setattr(owner, attribute, before)
        _remove_names()


def install(model_or_pipeline: Any, request: Any) -> Report:
    """Route one diffusers model, or every diffusers model of a pipeline (transformer, UNet, VAE; not the text encoders).

    Args:
        model_or_pipeline: a ``ModelMixin`` or a ``DiffusionPipeline``.
        request: as for :func:`attention_dispatch.set_attention_backend`.

    Returns:
        A report of the modules routed and left; names start with the component's in a pipeline.

    Raises:
        InvalidCallError: nothing to route. And what ``set_attention_backend`` raises; nothing is changed then.
    """
    activate()
    components = list(_components(model_or_pipeline))
    routed: list[tuple[str, str]] = []
    left: list[tuple[str, str]] = []
    done: list[nn.Module] = []
    try:
        for prefix, model in components:
            if len(components) > 1 and not models.find_sites(model):
                left.append((prefix, "it computes no attention"))
                continue
            report = models.set_attention_backend(model, request)
            done.append(model)
            routed += [(f"{prefix}.{name}".strip("."), wanted) for name, wanted in report.routed]
            left += [(f"{prefix}.{name}".strip("."), why) for name, why in report.left]
    except Exception:
        for model in done:
            models.reset_attention_backend(model)
        raise
    if not routed:
        raise InvalidCallError(f"{type(model_or_pipeline).__name__} holds no diffusers model that computes attention.")
    for model in done:
        _installed.add(model)
    return Report(tuple(routed), tuple(left))


def uninstall() -> None:
    """Reset every model given to :func:`install`, and leave diffusers as it was before this module was imported."""
    with _lock:
        for model in list(_installed):
            models.reset_attention_backend(model)
        _installed.clear()
        deactivate()


def _components(model_or_pipeline: Any) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(model_or_pipeline, nn.Module):
        yield "", model_or_pipeline
        return
    components = getattr(model_or_pipeline, "components", None)
    if not isinstance(components, dict):
        raise InvalidCallError(
            f"expected a diffusers model or pipeline, got {type(model_or_pipeline).__name__}. Pass pipeline.transformer."
        )
    for name, component in components.items():
        if isinstance(component, ModelMixin):
            yield name, component


def _set_on_model(self: ModelMixin, backend: Any, **patterns: Any) -> Report:
    """Route the attention of this model; see ``attention_dispatch.set_attention_backend``."""
    return models.set_attention_backend(self, backend, **patterns)


def _reset_on_model(self: ModelMixin) -> None:
    """Undo ``set_attention_backend`` on this model: its class defaults hold again."""
    models.reset_attention_backend(self)


def _set_on_module(self: Any, backend: Any) -> Report:
    """Route this attention module; see ``attention_dispatch.set_attention_backend``."""
    return models.set_attention_backend(self, backend)


def _init_and_route(self: ModelMixin, *args: Any, **kwargs: Any) -> None:
    # diffusers imports a model's file when the model is first named, which may be after activation.
    _upstream_init(self, *args, **kwargs)
    with _lock:
        if _replaced:
            _route_loaded_modules()


def _rebindings() -> tuple[tuple[str, Any, Any], ...]:
    return (
        ("dispatch_attention_fn", dispatch_attention_fn, _upstream_dispatch),
        ("attention_backend", attention_backend, _upstream_scope),
        ("F", _routed_functional, F),
    )


def _route_loaded_modules() -> None:
    """Rebind the names that files have imported. ``F`` only in diffusers' own: it is torch's everywhere else."""
    for name, module in list(sys.modules.items()):
        if not isinstance(module, types.ModuleType) or name.startswith("attention_dispatch"):
            continue
        for attribute, ours, theirs in _rebindings():
            if attribute == "F" and not name.startswith("diffusers."):
                continue
            if vars(module).get(attribute) is theirs:
                _replace(module, attribute, ours)


def _replace(owner: Any, attribute: str, value: Any) -> None:
    _replaced.append((owner, attribute, vars(owner).get(attribute, _MISSING)))
    setattr(owner, attribute, value)


def _add_names() -> None:
    """Make this library's names members of diffusers' enum, which some of its code converts names to."""
    enum: Any = upstream.AttentionBackendName
    known = {member.value for member in enum}
    for name in ("auto", "auto_quantized", *registry.names()):
        if name in known:
            continue
        label = name.upper()
        member = str.__new__(enum, name)
        member._name_, member._value_ = label, name
        enum._member_map_[label] = member
        enum._value2member_map_[name] = member
        enum._member_names_.append(label)
        upstream._AttentionBackendRegistry.register(member)(_backend_function(name))
        _added_names.append(label)


def _remove_names() -> None:
    enum: Any = upstream.AttentionBackendName
    registered = upstream._AttentionBackendRegistry
    while _added_names:
        label = _added_names.pop()
        member = enum._member_map_.pop(label)
        enum._value2member_map_.pop(member.value)
        enum._member_names_.remove(label)
        for table in (registered._backends, registered._constraints, registered._supported_arg_names):
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
        options = {"return_lse": return_lse, "window_size": window_size, "softcap": softcap, "deterministic": deterministic}
        return dispatch_attention_fn(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa,
            {option: setting for option, setting in options.items() if setting}, backend=name, parallel_config=_parallel_config,
        )  # fmt: skip

    return run


activate()
