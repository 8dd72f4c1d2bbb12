"""Make ``torch.nn.functional.scaled_dot_product_attention`` ask for the routed backend inside routed modules.

torch's function is replaced, while at least one module is routed by scope, by one that looks at a single attribute
of the thread: outside a routed module it is torch's function. Names bound by ``from ... import`` in the modules'
own files are replaced too. The last release puts back exactly what was there.
"""

from __future__ import annotations

import sys
import threading
import types
import weakref
from typing import Any

import torch.nn as nn
import torch.nn.functional as F

from .request import current

_original = F.scaled_dot_product_attention
_routed: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_rebound: list[types.ModuleType] = []
_lock = threading.RLock()
_NAME = "scaled_dot_product_attention"


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
    if current.model is None:
        return _original(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    return any_rank_sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)


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
    """BHSD attention through this library for tensors of any rank: torch's function takes 3-D ones too."""
    from .api import scaled_dot_product_attention

    if query.ndim == 4:
        return scaled_dot_product_attention(
            query, key, value, _as_torch(attn_mask, query), dropout_p, is_causal, scale, enable_gqa
        )
    if query.ndim == 3:
        mask = attn_mask[:, None] if attn_mask is not None and attn_mask.ndim == 3 else attn_mask
        query4, key4, value4 = (tensor[:, None] for tensor in (query, key, value))
        return scaled_dot_product_attention(
            query4, key4, value4, _as_torch(mask, query4), dropout_p, is_causal, scale, enable_gqa
        )[:, 0]
    return _original(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


def _as_torch(attn_mask: Any, query: Any) -> Any:
    """torch broadcasts masks from the right: 2-D is (Q, K), never key padding, and 3-D is (H, Q, K)."""
    if attn_mask is None or attn_mask.ndim >= 4:
        return attn_mask
    return attn_mask[(None,) * (4 - attn_mask.ndim)]


def intercept_sdpa(module: nn.Module) -> None:
    """Route the torch function for a module until :func:`release_sdpa`."""
    with _lock:
        _routed.add(module)
        if F.scaled_dot_product_attention is not _routed_sdpa:
            F.scaled_dot_product_attention = _routed_sdpa
        names = {type(part).__module__ for part in (module, getattr(module, "processor", None)) if part is not None}
        for name in names:
            home = sys.modules.get(name)
            if home is not None and getattr(home, _NAME, None) is _original and home is not F:
                setattr(home, _NAME, _routed_sdpa)
                _rebound.append(home)


def release_sdpa(module: nn.Module) -> None:
    """Undo :func:`intercept_sdpa`; with the last module torch's own function is back everywhere."""
    with _lock:
        _routed.discard(module)
        if _routed:
            return
        if F.scaled_dot_product_attention is _routed_sdpa:
            F.scaled_dot_product_attention = _original
        for home in _rebound:
            if getattr(home, _NAME, None) is _routed_sdpa:
                setattr(home, _NAME, _original)
        _rebound.clear()
