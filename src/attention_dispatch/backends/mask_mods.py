"""``mask_mod`` functions for FlexAttention: ``(batch, head, query, key) -> bool``, all of them index tensors.

https://docs.pytorch.org/docs/stable/nn.attention.flex_attention.html
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from ..call import FULL_WINDOW, AttentionCall
from ..errors import InvalidCallError
from .source import release

# Before 2.12, functions that differ in nothing but the defaults of their arguments share what was compiled for the first
# of them, so that all give its result (seen in 2.9 to 2.11).
_DEFAULTS_ARE_FORGOTTEN = release(torch.__version__)[:2] < (2, 12)
_FORGOTTEN = (
    "functions for a BlockMask that differ only in the defaults of their arguments are compiled as one. Let them take the "
    "value from an enclosing function instead: def make(reach): return lambda b, h, q, k: (q - k).abs() <= reach"
)


def _causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return q >= k


def _window(left: int, right: int) -> Callable[..., Tensor]:
    if left < 0:
        return lambda b, h, q, k: k <= q + right
    if right < 0:
        return lambda b, h, q, k: k >= q - left
    return lambda b, h, q, k: (k >= q - left) & (k <= q + right)


def padding(keep: Tensor) -> Callable[..., Tensor]:
    """True where a (B, K) or (1, K) mask keeps a key."""
    if keep.shape[0] == 1:
        row = keep[0]
        return lambda b, h, q, k: row[k]
    return lambda b, h, q, k: keep[b, k]


def broadcast_index(tensor: Tensor) -> Callable[..., Tensor]:
    """``tensor[b, h, q, k]`` for a 4-D tensor whose leading dimensions of size 1 are read at 0.

    They are taken off: an index of numbers and tensors cannot be mapped over in torch 2.9.
    """
    kept = [dim for dim in (0, 1, 2) if tensor.shape[dim] > 1]
    for dim in (2, 1, 0):
        if dim not in kept:
            tensor = tensor.select(dim, 0)

    def read(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        places = b, h, q
        index = (*(places[dim] for dim in kept), k)
        return tensor[index]

    return read


def both(first: Callable[..., Tensor], second: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """True where both are."""
    return lambda b, h, q, k: first(b, h, q, k) & second(b, h, q, k)


def structure_of(call: AttentionCall) -> Callable[..., Tensor] | None:
    """mask_mod of causal masking and window; None if there is neither."""
    mod = _causal if call.is_causal else None
    if call.window_size != FULL_WINDOW:
        sides = _window(*call.window_size)
        mod = sides if mod is None else both(mod, sides)
    return mod


def with_explicit_defaults(block_mask: BlockMask) -> BlockMask:
    """The same mask, its mask_mod's defaults passed on each call, where torch would forget them.

    Raises:
        InvalidCallError: a function that mask_mod calls has defaults, which cannot be passed for it.
    """
    mod = block_mask.mask_mod
    if not _DEFAULTS_ARE_FORGOTTEN:
        return block_mask
    defaults = getattr(mod, "__defaults__", None)
    if torch.compiler.is_compiling():
        if defaults:
            raise InvalidCallError(f"in a graph of torch before 2.12, {_FORGOTTEN}")
        return block_mask
    if any(inner.__defaults__ for inner in _called_by(mod)):
        raise InvalidCallError(f"mask_mod calls a function with defaults, and before torch 2.12 {_FORGOTTEN}")
    if not defaults:
        return block_mask
    explicit = copy.copy(block_mask)
    explicit.mask_mod = lambda b, h, q, k: mod(b, h, q, k, *defaults)
    return explicit


def _called_by(mod: Any) -> Iterator[FunctionType]:
    """Functions that a function holds in its closure, and those that these hold; each once, since one may hold itself."""
    seen: set[FunctionType] = set()
    waiting = [mod]
    while waiting:
        for cell in getattr(waiting.pop(), "__closure__", None) or ():
            held = cell.cell_contents
            for inner in held if isinstance(held, (tuple, list)) else (held,):
                if isinstance(inner, FunctionType) and inner not in seen:
                    seen.add(inner)
                    waiting.append(inner)
                    yield inner
