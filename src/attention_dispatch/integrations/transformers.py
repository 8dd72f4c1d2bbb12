"""Hugging Face transformers (5.x): after ``import attention_dispatch.integrations.transformers``, the attention
implementations ``"attention_dispatch"`` (the nearest setting) and ``"attention_dispatch:NAME"`` exist for every backend:

    model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="attention_dispatch:flex")

``attention_dispatch.set_attention_backend(model, ...)`` imports this module by itself and routes through it.

Masks keep their structure where transformers has one: padding stays (batch, keys), causal masking a flag and a sliding
window two numbers, so that no query x key mask is built for kernels that do without.
https://huggingface.co/docs/transformers/attention_interface
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface, PreTrainedModel

from .. import registry
from ..api import dispatch_attention_fn
from ..errors import BackendRejectedError, InvalidCallError, Reason
from ..request import AUTO, AUTO_QUANTIZED, parse
from .transformers_masks import STRUCTURE, attention_mask, read_structure

__all__ = ["NAME", "activate", "adopt", "attention_forward", "attention_mask", "deactivate", "release"]

NAME = "attention_dispatch"
_SAVED = "_attention_dispatch_implementation"
_UNSERVED = ("indices", "block_indices", "topk_indices", "layer_head_mask", "head_mask")
_lock = threading.RLock()
_upstream_check = PreTrainedModel._check_and_adjust_attn_implementation
_upstream_correct = PreTrainedModel.get_correct_attn_implementation


def implementation(name: str) -> str:
    """How a request is spelled for transformers, which takes every name with "flash" in it for one of its own."""
    return f"{NAME}:{name.upper() if 'flash' in name else name}"


def activate() -> None:
    """Register the implementations; done by importing this module. Calling it twice is the same as once."""
    with _lock:
        AttentionInterface.register(NAME, attention_forward)
        AttentionMaskInterface.register(NAME, attention_mask)
        for name in (AUTO, AUTO_QUANTIZED, *registry.names()):
            AttentionInterface.register(implementation(name), _forward_on(name))
            AttentionMaskInterface.register(implementation(name), attention_mask)
        model: Any = PreTrainedModel
        model._check_and_adjust_attn_implementation = _check_and_adjust
        model.get_correct_attn_implementation = _get_correct
        if _on_change not in registry._on_change:
            registry._on_change.append(_on_change)


def deactivate() -> None:
    """Remove what :func:`activate` registered. Models that use it must be reset first."""
    with _lock:
        for table in (AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping):
            for key in [key for key in table if key == NAME or key.startswith(f"{NAME}:")]:
                del table[key]
        model: Any = PreTrainedModel
        model._check_and_adjust_attn_implementation = _upstream_check
        model.get_correct_attn_implementation = _upstream_correct
        if _on_change in registry._on_change:
            registry._on_change.remove(_on_change)


def _on_change() -> None:
    activate()


def _spelled(wanted: Any) -> Any:
    """``"attention_dispatch:name"`` in transformers' spelling, after the checks that a request gets everywhere."""
    if not isinstance(wanted, str) or not wanted.startswith(f"{NAME}:"):
        return wanted
    request = parse(wanted.partition(":")[2])
    if request.mode == "demand":
        registry.require(request.names[0])
    return implementation(request.names[0] if request.names else request.mode)


def _check_and_adjust(self: PreTrainedModel, attn_implementation: Any, *args: Any, **kwargs: Any) -> Any:
    return _upstream_check(self, _spelled(attn_implementation), *args, **kwargs)


def _get_correct(self: PreTrainedModel, requested_attention: Any, *args: Any, **kwargs: Any) -> Any:
    return _upstream_correct(self, _spelled(requested_attention), *args, **kwargs)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    _backend: str | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention function; layout (batch, heads, seq, head_dim) in, (batch, seq, heads, head_dim) out.

    Args:
        module: the calling module; its own setting counts before the implementation's.
        attention_mask: from :func:`attention_mask`; or bool (True = attend) or additive, which is then the whole mask.
        is_causal: used where there is no mask; None takes ``module.is_causal``.
        s_aux: a sink per head: a key without a value. Served on backends with an LSE, without gradients.
        position_bias: added to the scores.

    Returns:
        The output; and with ``output_attentions`` the weights (batch, heads, Q, K), which the ``reference`` computes
        beside it, whatever the backend of the output; else None.

    Raises:
        BackendRejectedError: sparse indices, or gradients through sinks.
        InvalidCallError: attention weights and dropout, or the mask was changed on its way here.
    """
    _refuse_unserved(attention_mask, kwargs)
    wants_weights = _wants_weights(module, dropout, kwargs)
    options: dict[str, Any] = {}
    if softcap:
        options["softcap"] = softcap
    q_len, k_len = query.shape[2], key.shape[2]
    causal = False
    mask = attention_mask
    if mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        causal = q_len > 1 and causal
        if causal and k_len > q_len:
            # A static cache in its first step: what lies past the queries is not filled yet.
            key, value = key[:, :, :q_len], value[:, :, :q_len]
            position_bias = None if position_bias is None else position_bias[..., :q_len]
    elif mask.dtype == STRUCTURE:
        mask, causal = read_structure(mask, q_len, k_len, options)
    if position_bias is not None:
        mask = position_bias if mask is None else _biased(position_bias, mask)
    if query.shape[0] != key.shape[0]:
        query, key, value = _one_batch(query, key, value)
    if s_aux is not None:
        _refuse_gradients(query, key, value, s_aux)
        options["return_lse"] = True
    call: dict[str, Any] = {"attn_mask": mask, "dropout_p": dropout, "is_causal": causal, "scale": scaling}
    call["enable_gqa"] = query.shape[1] != key.shape[1]
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    backend = module.__dict__.get("_attention_backend") or _backend
    out = dispatch_attention_fn(query, key, value, attention_kwargs=options or None, backend=backend, **call)
    weights = None
    if wants_weights:
        options.pop("return_lse", None)
        weights = _weights(query, key, k_len, attention_kwargs=options or None, **call)
    if s_aux is not None:
        out, lse = out
        # The sink adds exp(s) to the denominator exp(lse).
        share = torch.sigmoid(lse - s_aux.to(lse.dtype).reshape(1, -1, 1))
        out = (out * share.transpose(1, 2)[..., None]).to(query.dtype)
        weights = None if weights is None else (weights * share[..., None]).to(query.dtype)
    return out.contiguous(), weights


def _wants_weights(module: nn.Module, dropout: float, kwargs: dict[str, Any]) -> bool:
    config = getattr(module, "config", None)
    wanted = bool(kwargs.get("output_attentions", getattr(config, "output_attentions", False)))
    if wanted and dropout:
        raise InvalidCallError(
            "output_attentions=True with dropout asks for the weights that were dropped, which no backend returns. Call "
            "model.eval(), or use attn_implementation='eager'."
        )
    return wanted


def _weights(query: Tensor, key: Tensor, k_len: int, **call: Any) -> Tensor:
    """(batch, heads, Q, ``k_len``): what attention makes of the identity for values. Keys past ``key`` have weight 0."""
    batch, keys, groups, _ = key.shape
    identity = torch.eye(keys, k_len, dtype=query.dtype, device=query.device)
    values = identity[None, :, None].expand(batch, -1, groups, -1)
    weights: Tensor = dispatch_attention_fn(query, key, values, backend="reference", **call)
    return weights.transpose(1, 2)


def _forward_on(name: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    def attention_forward_on(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        kwargs["_backend"] = name
        return attention_forward(*args, **kwargs)

    return attention_forward_on


def _biased(bias: Tensor, mask: Tensor) -> Tensor:
    return bias.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else bias + mask


def _one_batch(*tensors: Tensor) -> tuple[Tensor, ...]:
    batch = max(tensor.shape[0] for tensor in tensors)
    return tuple(tensor.expand(batch, -1, -1, -1) for tensor in tensors)


def _refuse_unserved(attention_mask: Any, kwargs: dict[str, Any]) -> None:
    for name in _UNSERVED:
        if kwargs.get(name) is not None:
            reason = Reason(
                "sparse", f"the model passes {name}=, which selects keys", "use attn_implementation='sdpa'."
            )
            raise BackendRejectedError(
                f"attention_dispatch cannot run this call: {reason}\n  Do:    {reason.fix}", (reason,)
            )
    if attention_mask is None and kwargs.get("cu_seq_lens_q") is not None and kwargs.get("position_ids") is None:
        raise InvalidCallError(
            "cu_seq_lens_q says that sequences are packed, but there is neither a mask nor position_ids to tell them "
            "apart. Pass position_ids that start again at 0 for each sequence."
        )


def _refuse_gradients(*tensors: Tensor) -> None:
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        reason = Reason(
            "gradients",
            "attention sinks are served from the LSE, which carries no gradients",
            "use torch.no_grad(), or attn_implementation='eager' for training.",
        )
        raise BackendRejectedError(
            f"attention_dispatch cannot run this call: {reason}\n  Do:    {reason.fix}", (reason,)
        )


class _Saved:
    """What a config said before it was changed; kept on a module of the model, so that copies have their own."""

    def __init__(self, config: Any, before: Any):
        self.config = config
        self.before = before
        _in_use.add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        _in_use.add(self)


_in_use: weakref.WeakSet[_Saved] = weakref.WeakSet()


def adopt(models: Sequence[nn.Module], routed: Iterable[nn.Module]) -> None:
    """Make the configs of routed attention modules, and of the models around them, name this library."""
    attention = {id(module): module for module in routed}
    if not attention:
        return
    owners: list[Any] = [
        module
        for model in models
        for module in model.modules()
        if id(module) in attention
        or (isinstance(module, PreTrainedModel) and any(id(part) in attention for part in module.modules()))
    ]
    for owner in owners:
        if _SAVED not in vars(owner):
            vars(owner)[_SAVED] = _Saved(owner.config, owner.config._attn_implementation)
    for owner in owners:
        owner.config._attn_implementation_internal = NAME


def release(model: nn.Module) -> None:
    """Undo :func:`adopt` on a model. A config that other routed modules share stays until they are reset too."""
    found = [vars(module).pop(_SAVED) for module in model.modules() if _SAVED in vars(module)]
    for saved in found:
        _in_use.discard(saved)
    # Where a config was changed twice, its modules agree on what was there before the first change.
    for saved in found:
        shared = any(other.config is saved.config for other in _in_use)
        if not shared and saved.config._attn_implementation == NAME:
            saved.config._attn_implementation_internal = saved.before


activate()
