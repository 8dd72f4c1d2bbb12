"""Make ``torch.nn.functional.scaled_dot_product_attention`` ask for the routed backend inside routed modules.

While at least one module is routed by scope, torch's function is replaced, in ``torch.nn.functional`` and in every
file that imported it by name, by one that reads a single attribute of the thread: outside a routed module it is torch's
function. When the last such module is reset or gone, torch's own function is back everywhere.
"""

from __future__ import annotations

import functools
import sys
import threading
import types
import weakref
from typing import Any

import torch
import torch.nn.functional as F

from . import registry
from .api import scaled_dot_product_attention
from .errors import InvalidCallError
from .request import current

_original = F.scaled_dot_product_attention
# What keeps the function replaced. Weak: models that are gone need no reset.
_scopes: weakref.WeakSet[Any] = weakref.WeakSet()
_lock = threading.RLock()


def _routed_sdpa(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """torch's scaled_dot_product_attention, on the backend of the routed module whose forward is running."""
    if current.state.model is None:
        return _original(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    return any_rank_sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)


# torch.jit.script knows torch's functions by identity; another model may be scripted while one is routed.
if hasattr(torch.jit._builtins, "_register_builtin"):
    torch.jit._builtins._register_builtin(_routed_sdpa, "aten::scaled_dot_product_attention")


# torch.compile takes F.multi_head_attention_forward for one operator of the graph, run after the scope around it has
# ended, but knows it by identity: the same code in another function is traced.
_original_multihead: Any = F.multi_head_attention_forward
_traceable_multihead = types.FunctionType(
    _original_multihead.__code__, vars(F), _original_multihead.__name__, _original_multihead.__defaults__
)
_traceable_multihead.__kwdefaults__ = _original_multihead.__kwdefaults__


def _check_key_padding_mask(key_padding_mask: torch.Tensor, src_len: int, bsz: int) -> None:
    if key_padding_mask.shape[0] != bsz or key_padding_mask.shape[1] != src_len:
        raise AssertionError("key_padding_mask must be of shape (batch, key length)")


@functools.cache
def _let_key_padding_be_traced() -> None:
    check = getattr(F, "_check_key_padding_mask", None)
    if check is not None:
        # It calls torch._check_with, which cannot be traced (torch 2.13).
        torch.compiler.substitute_in_graph(check, skip_signature_check=True)(_check_key_padding_mask)


_REPLACEMENTS = ((_original, _routed_sdpa), (_original_multihead, _traceable_multihead))


def is_sdpa(value: Any) -> bool:
    """Whether a value is torch's function or its replacement."""
    return value is _original or value is _routed_sdpa


def any_rank_sdpa(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Any:
    """Attention through this library with torch's reading of shapes: (..., heads, seq, head_dim) of any rank, with leading
    dimensions and masks broadcast from the right."""
    if query.is_nested:
        raise InvalidCallError(
            "nested tensors cannot be routed. Pass padded tensors with a mask, or leave this module out: "
            "set_attention_backend(model, ..., exclude='its.name')."
        )
    if query.ndim == 4 and key.ndim == 4 and query.shape[0] == key.shape[0]:
        if attn_mask is not None and attn_mask.ndim < 4:
            attn_mask = attn_mask[(None,) * (4 - attn_mask.ndim)]
        if query.shape[1] == key.shape[1] or enable_gqa:
            return scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    lead = query.shape[:-3] if enable_gqa else query.shape[:-2]
    lead = torch.broadcast_shapes(lead, key.shape[: key.ndim - query.ndim + len(lead)])
    query, key, value = (_with_lead(tensor, lead, 3 if enable_gqa else 2) for tensor in (query, key, value))
    mask = attn_mask
    if mask is not None:
        heads = query.shape[-3:-2] if enable_gqa else ()
        mask = _with_lead(mask.expand(*lead, *heads, *mask.shape[-2:]), lead, 2 + len(heads))
        mask = _four_dims(mask, lead)
    query4, key4, value4 = (_four_dims(tensor, lead) for tensor in (query, key, value))
    result = scaled_dot_product_attention(query4, key4, value4, mask, dropout_p, is_causal, scale, enable_gqa)
    return result.reshape(*query.shape[:-1], value.shape[-1])


def _with_lead(tensor: Any, lead: tuple[int, ...], kept: int) -> Any:
    return tensor.expand(*lead, *tensor.shape[-kept:])


def _four_dims(tensor: Any, lead: tuple[int, ...]) -> Any:
    """(*lead, [heads,] seq, dim) as (batch, heads, seq, dim)."""
    rest = tensor.shape[len(lead) :]
    if len(rest) == 3:
        return tensor.reshape(-1, *rest)
    heads = lead[-1] if lead else 1
    return tensor.reshape(-1, heads, *rest)


def intercept(scope: Any) -> None:
    """Keep torch's function replaced for as long as ``scope`` lives, or until :func:`release`."""
    with _lock:
        # The backends bind torch's own function when they are loaded.
        registry.get("native")
        _let_key_padding_be_traced()
        _scopes.add(scope)
        weakref.finalize(scope, _restore_if_unused).atexit = False
        _swap(all_files=False)


def intercept_everywhere() -> None:
    """Replace the function in files imported since the first replacement too."""
    with _lock:
        if _in_use():
            _swap(all_files=True)


def release(scope: Any) -> None:
    """Undo :func:`intercept`."""
    with _lock:
        _scopes.discard(scope)
        _restore_if_unused()


def _in_use() -> bool:
    # Not len(): while a scope dies, the set may still count it.
    return any(True for _ in _scopes)


def _restore_if_unused() -> None:
    with _lock:
        if not _in_use():
            _swap(back=True, all_files=True)


def _swap(all_files: bool, back: bool = False) -> None:
    """Put the replacements in place, or torch's functions ``back``; without ``all_files`` only where that was not done."""
    pairs = [pair[::-1] if back else pair for pair in _REPLACEMENTS]
    if not all_files and F.scaled_dot_product_attention is pairs[0][1]:
        return
    new_for = {id(old): new for old, new in pairs}
    for name, module in [("", F), *sys.modules.items()]:
        if not isinstance(module, types.ModuleType) or name.startswith(("torch.", "attention_dispatch.")):
            continue
        for attribute, value in list(vars(module).items()):
            if id(value) in new_for:
                setattr(module, attribute, new_for[id(value)])
