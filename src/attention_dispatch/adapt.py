"""The only code that changes layouts, pads, packs, expands or merges masks for a kernel, and undoes it.

``ADAPTERS`` lists every conversion that copies, with its bytes, so that ``explain`` can show what a call costs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .call import FULL_WINDOW, AttentionCall
from .masks import Mask, derived, keep_matrix


class Adapter(NamedTuple):
    """A conversion that copies: what it does, and how many bytes it writes for a call."""

    what: str
    bytes: Callable[[AttentionCall], int]


def _dense_mask_bytes(call: AttentionCall) -> int:
    batch, heads = _mask_rows(call)
    width = call.query.element_size() if call.mask is not None and call.mask.kind == "bias" else 1
    return batch * heads * call.query.shape[1] * call.key.shape[1] * width


def _expanded_kv_bytes(call: AttentionCall) -> int:
    groups = call.query.shape[2] // call.key.shape[2]
    return groups * (call.key.numel() * call.key.element_size() + call.value.numel() * call.value.element_size())


def _padded_head_dim_bytes(call: AttentionCall) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in (call.query, call.key, call.value))


def _aligned_bias_bytes(call: AttentionCall) -> int:
    batch, heads = _mask_rows(call)
    return batch * heads * call.query.shape[1] * (-(-call.key.shape[1] // 8) * 8) * call.query.element_size()


def _additive_mask_bytes(call: AttentionCall) -> int:
    merged = call.is_causal or call.window_size != FULL_WINDOW
    if merged or call.mask is None or call.mask.tensor is None:
        batch, heads = _mask_rows(call)
        return batch * heads * call.query.shape[1] * call.key.shape[1] * call.query.element_size()
    return call.mask.tensor.numel() * call.query.element_size()


def _mask_rows(call: AttentionCall) -> tuple[int, int]:
    """How many samples and heads have a mask of their own."""
    if call.mask is None or call.mask.tensor is None:
        return 1, 1
    tensor = call.mask.tensor
    return tensor.shape[0], tensor.shape[1] if tensor.ndim == 4 else 1


ADAPTERS: dict[str, Adapter] = {
    "dense_mask": Adapter("builds a Q x K mask from causal masking, window and mask", _dense_mask_bytes),
    "expand_kv": Adapter("repeats k and v for every query head", _expanded_kv_bytes),
    "pad_head_dim": Adapter("pads the head dim to a multiple of 8", _padded_head_dim_bytes),
    "aligned_bias": Adapter(
        "writes an additive mask for all queries, its rows aligned to 16 bytes", _aligned_bias_bytes
    ),
    "additive_mask": Adapter("turns the bool mask into an additive one", _additive_mask_bytes),
}


def expand_kv(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """k and v with as many heads as q; copies when the head counts differ."""
    groups = call.query.shape[2] // call.key.shape[2]
    if groups == 1:
        return call.key, call.value
    return call.key.repeat_interleave(groups, dim=2), call.value.repeat_interleave(groups, dim=2)


def pad_head_dim(tensor: Tensor, multiple: int) -> Tensor:
    """Zero-pad the last dimension up to a multiple; the tensor itself when it already is one."""
    missing = -tensor.shape[-1] % multiple
    return F.pad(tensor, (0, missing)) if missing else tensor


def as_dense_mask(call: AttentionCall) -> Tensor | None:
    """Everything that hides keys, merged: bool or additive, 4-D, broadcastable to (B, H, Q, K); None if nothing does.

    Built once per mask object. A key-padding or dense mask alone is a view.
    """
    mask = call.mask
    tensor = None if mask is None else mask.tensor
    if tensor is not None and mask is not None and mask.kind == "key_padding":
        tensor = tensor[:, None, None, :]
    if not call.is_causal and call.window_size == FULL_WINDOW:
        return tensor
    q_len, k_len = call.query.shape[1], call.key.shape[1]

    def merged() -> Tensor:
        keep = keep_matrix(q_len, k_len, call.is_causal, call.window_size, call.query.device)[None, None]
        if tensor is None:
            return keep
        return tensor & keep if tensor.dtype == torch.bool else tensor.masked_fill(~keep, float("-inf"))

    if tensor is None or tensor.requires_grad:
        return merged()
    return derived(tensor, ("dense", q_len, k_len, call.is_causal, call.window_size), merged)


def as_additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask as 0 / -inf in ``dtype``; an additive one cast to ``dtype``, where finite numbers stay finite."""
    if mask.dtype == dtype:
        return mask

    def build() -> Tensor:
        if mask.dtype == torch.bool:
            return torch.where(mask, torch.zeros((), dtype=dtype, device=mask.device), float("-inf"))
        limit = torch.finfo(dtype).max
        if torch.finfo(mask.dtype).max <= limit:
            return mask.to(dtype)
        # torch.finfo(torch.float32).min would become -inf, which hides a key also where all are equally unlikely.
        return torch.where(mask == float("-inf"), mask, mask.clamp(-limit, limit)).to(dtype)

    return build() if mask.requires_grad else derived(mask, ("additive", dtype), build)


def aligned_bias(mask: Tensor, shape: tuple[int, int, int, int], dtype: torch.dtype) -> Tensor:
    """An additive mask expanded to ``shape`` (B, H, Q, K) whose rows start at multiples of 16 bytes."""

    def build() -> Tensor:
        padded_k = -(-shape[3] // 8) * 8
        # B and H stay broadcast (stride 0) where the mask does not depend on them.
        storage = torch.empty((mask.shape[0], mask.shape[1], shape[2], padded_k), dtype=dtype, device=mask.device)
        storage[..., : shape[3]] = as_additive(mask, dtype)
        return storage[..., : shape[3]]

    if mask.requires_grad:
        padded = F.pad(as_additive(mask, dtype).expand(-1, -1, shape[2], shape[3]), (0, -shape[3] % 8))
        return padded[..., : shape[3]].expand(shape)
    return derived(mask, ("aligned", shape, dtype), build).expand(shape)


def top_left_by_slicing(call: AttentionCall) -> AttentionCall:
    """A causal call with fewer queries than keys, as an equal-length one: keys past the last query are never seen.

    Serves kernels whose causal masking is bottom-right aligned; a view.
    """
    q_len = call.query.shape[1]
    if q_len >= call.key.shape[1]:
        return call
    mask = call.mask
    if mask is not None and mask.tensor is not None:
        mask = Mask(mask.kind, mask.tensor[..., :q_len])
    return call.replaced(key=call.key[:, :q_len], value=call.value[:, :q_len], mask=mask)


def rows_without_key(call: AttentionCall) -> Tensor | None:
    """Bool, broadcastable to (B, H, Q): True where a query may attend to no key; None if that cannot happen."""
    q_len, k_len = call.query.shape[1], call.key.shape[1]
    left, _right = call.window_size
    if call.mask is None and (left < 0 or q_len <= k_len):
        return None
    dense = as_dense_mask(call)
    if dense is None:
        return None
    keep = dense if dense.dtype == torch.bool else dense != float("-inf")
    return ~keep.any(dim=-1)
