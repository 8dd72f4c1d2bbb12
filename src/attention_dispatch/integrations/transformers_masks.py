"""Masks of transformers that keep their structure on the way from where they are made to where they are used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils

from ..errors import InvalidCallError

# A causal mask that keeps its structure is an int8 tensor, a dtype that no other attention mask has: plain tensors survive
# slicing, moving between devices, compilation and export. Its shape (B or 1, W + 1, R, K) says: sliding window of W keys,
# 0 for none; R = 1: nonzero where a key is not padding; R = 2: no key is padding. Query i stands at key i + K - Q.
STRUCTURE = torch.int8


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: Any = "cpu",
    config: Any = None,
    **kwargs: Any,
) -> Tensor | None:
    """The mask for :func:`attention_forward`: as structure where there is one, else what transformers builds for sdpa.

    Takes transformers' arguments of a mask function.
    """
    padding = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if not use_vmap and mask_function is masking_utils.bidirectional_mask_function and allow_is_bidirectional_skip:
        if padding is None or _known_full(padding):
            return None
        return _at_keys(padding, kv_length, kv_offset)[:, None, None, :]
    window = _window(mask_function, local_size, config)
    if allow_is_causal_skip and not use_vmap and window is not None and q_length > 1:
        offset = kv_length - q_length
        known = isinstance(q_offset, int) and isinstance(kv_offset, int) and q_offset - kv_offset == offset
        if known and not (window and window <= offset):
            return _structured(padding, batch_size, q_length, kv_length, kv_offset, window, device)
    return masking_utils.sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=allow_is_causal_skip,
        allow_is_bidirectional_skip=allow_is_bidirectional_skip,
        use_vmap=use_vmap,
        device=device,
        config=config,
        **kwargs,
    )


def _structured(
    padding: Tensor | None, batch: int, q_length: int, kv_length: int, kv_offset: int, window: int, device: Any
) -> Tensor | None:
    if window >= kv_length:
        window = 0
    if padding is None or _known_full(padding):
        if q_length == kv_length and not window:
            return None  # causal masking alone, which the module's own flag says
        return torch.ones((), dtype=STRUCTURE, device=device).expand(1, window + 1, 2, kv_length)
    keep = _at_keys(padding, kv_length, kv_offset).to(STRUCTURE)
    return keep[:, None, None, :].expand(-1, window + 1, -1, -1)


def _window(mask_function: Any, local_size: int | None, config: Any) -> int | None:
    """Keys in the sliding window of a plainly causal mask, 0 for no window; None for any other mask."""
    if local_size is None:
        return 0 if mask_function is masking_utils.causal_mask_function else None
    sliding, chunk = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    bidirectional = not getattr(config, "is_causal", True)
    return local_size if local_size == sliding and local_size != chunk and not bidirectional else None


def _at_keys(padding: Tensor, kv_length: int, kv_offset: int) -> Tensor:
    return padding[:, kv_offset : kv_offset + kv_length]


def _known_full(padding: Tensor) -> bool:
    return not masking_utils.is_tracing(padding) and bool(padding.all())


def read_structure(mask: Tensor, q_len: int, k_len: int, options: dict[str, Any]) -> tuple[Tensor | None, bool]:
    """(mask, is_causal) of a structured mask; a window goes into ``options``."""
    if mask.ndim != 4 or mask.shape[2] not in (1, 2) or mask.shape[3] != k_len:
        raise InvalidCallError(
            f"the model changed its mask to shape {tuple(mask.shape)}, for {k_len} keys, before its attention saw it. "
            f"Use attn_implementation='sdpa' for this model, or pass a 4-D mask of your own."
        )
    window, offset = mask.shape[1] - 1, k_len - q_len
    left = window - 1 - offset if window else -1
    padding = mask[:, 0, :1].bool()[:, None] if mask.shape[2] == 1 else None
    if offset == 0:
        if window:
            options["window_size"] = (left, 0)
        return padding, True
    # Q < K with a cache: causal masking is aligned to the last key, which a top-left window says.
    options["window_size"] = (left, offset)
    return padding, False
