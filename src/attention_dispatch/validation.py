"""What a caller may pass: each mistake is one clear ``InvalidCallError``, the same whichever backend is set."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from .errors import InvalidCallError
from .masks import check_dense


def check_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Refuse what is no dense floating-point tensor of four dimensions, or on another device than query."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise InvalidCallError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}.")
        check_dense(name, tensor)
        if tensor.ndim != 4:
            raise InvalidCallError(
                f"{name} must have 4 dimensions (batch, seq, heads, head_dim), got shape {tuple(tensor.shape)}."
            )
        if not tensor.is_floating_point():
            raise InvalidCallError(
                f"{name} must be floating point, got {tensor.dtype}. Use {name}.to(torch.bfloat16), for example."
            )
    if query.device != key.device or query.device != value.device:
        raise InvalidCallError(
            f"query, key and value must be on one device, got {query.device}, {key.device} and {value.device}."
        )


def check_shapes(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> None:
    """Refuse BSHD tensors whose batches, lengths, head counts or head dims do not fit together."""
    batch, _, heads, head_dim = query.shape
    if key.shape[0] != batch or value.shape[0] != batch:
        raise InvalidCallError(
            f"batch sizes differ: query {batch}, key {key.shape[0]}, value {value.shape[0]}. Use .expand."
        )
    if key.shape[1] != value.shape[1]:
        raise InvalidCallError(f"key and value must have one sequence length, got {key.shape[1]} and {value.shape[1]}.")
    if key.shape[3] != head_dim:
        raise InvalidCallError(f"query and key must have one head_dim, got {head_dim} and {key.shape[3]}.")
    if head_dim == 0:
        raise InvalidCallError(f"head_dim must be at least 1, got query of shape {tuple(query.shape)}.")
    if key.shape[2] != value.shape[2]:
        raise InvalidCallError(f"key and value must have as many heads, got {key.shape[2]} and {value.shape[2]}.")
    kv_heads = key.shape[2]
    if heads != kv_heads:
        if not enable_gqa:
            raise InvalidCallError(
                f"query has {heads} heads and key {kv_heads}: pass enable_gqa=True for grouped-query attention. "
                f"(The layout is (batch, seq, heads, head_dim); are seq and heads swapped?)"
            )
        if kv_heads == 0 or heads % kv_heads != 0:
            raise InvalidCallError(f"query heads ({heads}) must be a multiple of key heads ({kv_heads}).")


def check_numbers(dropout_p: Any, scale: Any) -> None:
    """Refuse a dropout probability outside [0, 1), and a scale that is no finite number."""
    if isinstance(dropout_p, Tensor) or not isinstance(dropout_p, (int, float)) or not 0.0 <= dropout_p < 1.0:
        raise InvalidCallError(f"dropout_p must be a number in [0, 1), got {dropout_p!r}.")
    if scale is not None:
        if isinstance(scale, bool) or not isinstance(scale, (int, float)):
            raise InvalidCallError(
                f"scale must be a float or None, got {type(scale).__name__}. Use scale.item() for a tensor."
            )
        # Comparisons, not math.isfinite: torch.compile makes floats symbolic with dynamic=True.
        if not -math.inf < scale < math.inf:
            raise InvalidCallError(f"scale must be finite, got {scale!r}.")


def checked_flag(name: str, value: Any) -> bool:
    """A switch as a bool."""
    if isinstance(value, (str, bytes)):
        # bool("False") is True.
        raise InvalidCallError(f"{name} must be True or False, got {value!r}.")
    return bool(value)


def checked_softcap(value: Any) -> float:
    """A softcap as a float; None is 0.0, off."""
    if value is None:
        return 0.0
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value < math.inf:
        raise InvalidCallError(f"softcap must be a finite number >= 0, got {value!r}.")
    return float(value)


def checked_window(value: Any) -> tuple[int, int]:
    """A window as (left, right); a side that is None is -1, unbounded."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise InvalidCallError(f"window_size must be a pair (left, right) of ints, -1 for unbounded, got {value!r}.")
    left, right = (-1 if side is None else side for side in value)
    if any(isinstance(side, bool) or not isinstance(side, int) or side < -1 for side in (left, right)):
        raise InvalidCallError(f"window_size must be a pair (left, right) of ints >= -1, got {value!r}.")
    return left, right
