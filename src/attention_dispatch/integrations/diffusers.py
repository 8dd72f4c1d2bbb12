"""Hugging Face diffusers (>= 0.42): after ``import attention_dispatch.integrations.diffusers``, its documented calls
``model.set_attention_backend(name)``, ``model.reset_attention_backend()`` and ``with attention_backend(name)`` route
through this library, in models that use diffusers' dispatcher and in VAEs and older processors that call
``F.scaled_dot_product_attention``.

https://huggingface.co/docs/diffusers/optimization/attention_backends
"""

from __future__ import annotations

import functools
import sys
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any

import diffusers
import torch.nn as nn
import torch.nn.functional as F
from diffusers.hooks import layer_skip
from diffusers.models import attention_dispatch as upstream
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.modeling_utils import ModelMixin

from .. import api, models, registry, request, settings
from ..api import request_for
from ..errors import InvalidCallError
from ..interception import any_rank_sdpa
from ..models import Report
from ..request import NATIVE, current, environment
from ..sites import find_sites
from .diffusers_names import add_and_remove_names, member_for_several, remove_names
from .diffusers_skip import skip_scores

__all__ = ["activate", "deactivate", "install", "refusal", "uninstall"]

_MISSING = object()
_lock = threading.RLock()
# (object, attribute, value before, value set) of every attribute replaced, in order.
_replaced: list[tuple[Any, str, Any, Any]] = []
# Everything set through diffusers' own methods or install(). Weak: what is gone needs no reset.
_routed: weakref.WeakSet[nn.Module] = weakref.WeakSet()

_upstream_dispatch = upstream.dispatch_attention_fn
_upstream_scope = upstream.attention_backend
_upstream_registry = upstream._AttentionBackendRegistry
_upstream_init = ModelMixin.__init__
_upstream_setstate = ModelMixin.__setstate__
_upstream_npu = AttentionModuleMixin.set_use_npu_flash_attention
_upstream_xla = AttentionModuleMixin.set_use_xla_flash_attention
_upstream_xformers = AttentionModuleMixin.set_use_memory_efficient_attention_xformers
_upstream_parallelism = ModelMixin.enable_parallelism


# Objects of their own, so that files which imported them from diffusers can be told from files that imported
# this library's, and given diffusers' back.
dispatch_attention_fn = types.FunctionType(
    api.dispatch_attention_fn.__code__, vars(api), "dispatch_attention_fn", api.dispatch_attention_fn.__defaults__
)
dispatch_attention_fn.__kwdefaults__ = api.dispatch_attention_fn.__kwdefaults__
dispatch_attention_fn.__doc__ = api.dispatch_attention_fn.__doc__


class attention_backend(request.attention_backend):  # lower case: it is used like a function
    """See :class:`attention_dispatch.attention_backend`."""

    __slots__ = ()


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
    if current.state.effective is None and environment() == NATIVE:
        # Nothing was asked for: whatever torch, or a program that replaced its function, does.
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    return any_rank_sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)


class _Functional(types.ModuleType):
    """``torch.nn.functional`` whose attention is routed: diffusers' files name it ``F``, other code keeps torch's."""

    scaled_dot_product_attention = staticmethod(_sdpa)

    def __getattr__(self, name: str) -> Any:
        return getattr(F, name)


class _Registry(_upstream_registry, metaclass=type(settings._AttentionBackendRegistry)):  # type: ignore[metaclass]
    """diffusers' registry, whose ``_checks_enabled`` is this library's switch and whose active backend is the scope's."""

    @classmethod
    def get_active_backend(cls) -> tuple[Any, Callable[..., Any]]:
        request = request_for(None)
        member = upstream.AttentionBackendName(request.names[0] if request.mode == "demand" else "native")
        return member, cls._backends[member]

    @classmethod
    def _is_context_parallel_available(cls, name: Any) -> bool:
        # Found out call by call, for all ranks together; what cannot be served is refused there.
        return True


_functional = _Functional("torch.nn.functional")
_REBINDINGS = (
    (_upstream_dispatch, dispatch_attention_fn),
    (_upstream_scope, attention_backend),
    (_upstream_registry, _Registry),
    (F, _functional),
)


def activate() -> None:
    """Route diffusers through this library; done by importing this module. Calling it twice is the same as once.

    Raises:
        InvalidCallError: this diffusers lacks something that has to be replaced.
    """
    with _lock:
        if _replaced:
            return
        for name in ("_backends", "_supported_arg_names", "_constraints", "_supports_context_parallel"):
            if not hasattr(_upstream_registry, name):
                raise InvalidCallError(
                    f"diffusers {diffusers.__version__} has no attention registry with {name!r}, so it cannot be routed. "
                    f"Install a tested version: pip install 'diffusers>=0.42,<0.43'."
                )
        _replace(ModelMixin, "set_attention_backend", _set_on_model)
        _replace(ModelMixin, "reset_attention_backend", _reset_on_model)
        _replace(ModelMixin, "enable_parallelism", _enable_parallelism)
        _replace(ModelMixin, "__init__", _init_and_route)
        _replace(ModelMixin, "__setstate__", _setstate_and_route)
        _replace(AttentionModuleMixin, "set_attention_backend", _set_on_module)
        _replace(AttentionModuleMixin, "set_use_npu_flash_attention", _use_npu)
        _replace(AttentionModuleMixin, "set_use_xla_flash_attention", _use_xla)
        _replace(AttentionModuleMixin, "set_use_memory_efficient_attention_xformers", _use_xformers)
        _replace(layer_skip.AttentionProcessorSkipHook, "new_forward", skip_scores)
        _replace(upstream.AttentionBackendName, "_missing_", classmethod(member_for_several))
        if _upstream_registry._checks_enabled and not settings.checks():
            settings.set_checks(True)
        with registry._lock:
            add_and_remove_names()
            registry._on_change.append(add_and_remove_names)
        for theirs, ours in _REBINDINGS:
            _rebind(theirs, ours, only_in="diffusers." if theirs is F else "")


def deactivate() -> None:
    """Put back everything that :func:`activate` replaced. Settings of models stay; see :func:`uninstall`."""
    with _lock:
        if not _replaced:
            return
        for theirs, ours in _REBINDINGS:
            _rebind(ours, theirs)
        with registry._lock:
            registry._on_change.remove(add_and_remove_names)
            remove_names()
        while _replaced:
            owner, attribute, before, ours = _replaced.pop()
            if vars(owner).get(attribute) is not ours:
                continue  # another program replaced it since
            if before is _MISSING:
                delattr(owner, attribute)
            else:
                setattr(owner, attribute, before)


def install(model_or_pipeline: Any, request: Any, **patterns: Any) -> Report:
    """Route one diffusers model, or every diffusers model of a pipeline (transformer, UNet, VAE; not the text encoders).

    Args:
        model_or_pipeline: a ``ModelMixin``, compiled or not, or a ``DiffusionPipeline``.
        request: as for :func:`attention_dispatch.set_attention_backend`.
        patterns: its ``include`` and ``exclude``.

    Returns:
        A report of the modules routed and left; names start with the component's in a pipeline.

    Raises:
        InvalidCallError: nothing to route. And what ``set_attention_backend`` raises; nothing is changed then.

    Example:
        >>> import diffusers
        >>> from attention_dispatch.integrations.diffusers import install, uninstall
        >>> vae = diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2)
        >>> print(install(vae, "reference"))
        2 attention modules routed, 0 left
          encoder.mid_block.attentions.0 -> 'reference'
          decoder.mid_block.attentions.0 -> 'reference'
        >>> uninstall()
    """
    with _lock:
        was_active = bool(_replaced)
        activate()
        try:
            return _set(_models_of(model_or_pipeline), request, **patterns)
        except BaseException:
            if not was_active:
                deactivate()
            raise


def uninstall() -> None:
    """Leave diffusers as it was before this module was imported, and reset every model that was set by :func:`install`
    or by diffusers' own methods. What ``attention_dispatch.set_attention_backend`` set, its own reset undoes."""
    with _lock:
        for model in list(_routed):
            models.reset_attention_backend(model)
        _routed.clear()
        deactivate()


class _Components:
    """The diffusers models of a pipeline, as :func:`attention_dispatch.set_attention_backend` takes a pipeline."""

    def __init__(self, components: dict[str, nn.Module]):
        self.components = components


def _models_of(model_or_pipeline: Any) -> Any:
    if isinstance(model_or_pipeline, nn.Module):
        return model_or_pipeline
    components = getattr(model_or_pipeline, "components", None)
    if not isinstance(components, dict):
        raise InvalidCallError(
            f"expected a diffusers model or pipeline, got {type(model_or_pipeline).__name__}. Pass pipeline.transformer."
        )
    found = {
        name: component
        for name, component in components.items()
        if isinstance(getattr(component, "_orig_mod", component), ModelMixin)
    }
    if not any(find_sites(model) for model in found.values()):
        raise InvalidCallError(f"{type(model_or_pipeline).__name__} holds no diffusers model that computes attention.")
    return _Components(found)


def _set(model: Any, request: Any, **patterns: Any) -> Report:
    """Set a model or :class:`_Components`, and remember it for :func:`uninstall`."""
    report = models.set_attention_backend(model, request, **patterns)
    for part in model.components.values() if isinstance(model, _Components) else (model,):
        _routed.add(part)
    return report


def refusal(holder: Any, choice: Any) -> str:
    """Why a processor that names the backends it accepts would raise when it runs; empty if it would not.

    Args:
        holder: a module or processor. choice: what it would be set to.
    """
    accepted = getattr(holder, "_SUPPORTED_BACKENDS", None)
    if accepted is None or (getattr(choice, "mode", "") == "demand" and choice.names[0] in list(accepted)):
        return ""
    return f"accepts only {' or '.join(repr(name) for name in accepted if name in registry.names())}"


def _set_on_model(self: ModelMixin, backend: Any, **patterns: Any) -> Report:
    """Route the attention of this model; see ``attention_dispatch.set_attention_backend``."""
    return _set(self, backend, **patterns)


def _reset_on_model(self: ModelMixin) -> None:
    """Undo ``set_attention_backend`` on this model: its class defaults hold again."""
    models.reset_attention_backend(self)
    _routed.discard(self)


@functools.wraps(_upstream_parallelism)
def _enable_parallelism(self: ModelMixin, *, config: Any, cp_plan: Any = None) -> None:
    _upstream_parallelism(self, config=config, cp_plan=cp_plan)
    from ..distributed import as_context_parallel, give, has_carriers

    parallel = as_context_parallel(self._parallel_config)
    if parallel is not None and not has_carriers(self):
        # diffusers (0.42) splits the inputs of such a model all the same, and leaves each rank's attention to itself.
        give(self, parallel)


def _set_on_module(self: Any, backend: Any) -> Report:
    """Route this attention module; see ``attention_dispatch.set_attention_backend``."""
    return _set(self, backend)


@functools.wraps(_upstream_npu)
def _use_npu(self: Any, use_npu_flash_attention: bool) -> None:
    if use_npu_flash_attention:
        _upstream_npu(self, use_npu_flash_attention)
    else:
        _stop_using(self, "_native_npu")


@functools.wraps(_upstream_xla)
def _use_xla(self: Any, use_xla_flash_attention: bool, *args: Any, **kwargs: Any) -> None:
    if use_xla_flash_attention:
        _upstream_xla(self, use_xla_flash_attention, *args, **kwargs)
    else:
        _stop_using(self, "_native_xla")


@functools.wraps(_upstream_xformers)
def _use_xformers(self: Any, use_memory_efficient_attention_xformers: bool, *args: Any, **kwargs: Any) -> None:
    if use_memory_efficient_attention_xformers:
        _upstream_xformers(self, use_memory_efficient_attention_xformers, *args, **kwargs)
    else:
        _stop_using(self, "xformers")


def _stop_using(module: Any, name: str) -> None:
    # diffusers (0.42) sets NPU and XLA here too, and leaves xformers set.
    if getattr(module.processor, "_attention_backend", None) == name:
        models.reset_attention_backend(module)


@functools.wraps(_upstream_init)
def _init_and_route(self: ModelMixin, *args: Any, **kwargs: Any) -> None:
    # diffusers imports a model's file when the model is first named, which may be after activation.
    _upstream_init(self, *args, **kwargs)
    _route_files_imported_since()


def _setstate_and_route(self: ModelMixin, state: Any) -> None:
    # A model read from a pickle imports its file, and is not initialised.
    _upstream_setstate(self, state)
    _route_files_imported_since()


def _route_files_imported_since() -> None:
    with _lock:
        if _replaced:
            # The other names come from a file of diffusers that has been rebound.
            _rebind(F, _functional, only_in="diffusers.")


def _rebind(old: Any, new: Any, only_in: str = "") -> None:
    """Replace an object in every loaded file that has a global name for it, or in files of one package."""
    for name, module in list(sys.modules.items()):
        if not isinstance(module, types.ModuleType) or not name.startswith(only_in):
            continue
        if name.startswith(("attention_dispatch.", "torch.")) or name == "torch":
            continue
        for attribute, value in list(vars(module).items()):
            # torch.compile keeps modules under names such as __import_torch_dot_nn_dot_functional.
            if value is old and not attribute.startswith("__"):
                setattr(module, attribute, new)


def _replace(owner: Any, attribute: str, value: Any) -> None:
    _replaced.append((owner, attribute, vars(owner).get(attribute, _MISSING), value))
    setattr(owner, attribute, value)


activate()
