"""Masks that depend on the query, for FlashAttention 4: it compiles a function of the caller's into its kernel.

``mask_mod(batch, head, row, column, lengths, aux) -> keep`` and ``score_mod(score, batch, head, q_idx, kv_idx, seqlen_info,
aux_tensors) -> score`` are traced by the CuTe DSL and may read tensors that come along (4.0.0b36:
https://github.com/Dao-AILab/flash-attention/tree/main/flash_attn/cute). Scores arrive scaled. A mask is read where it lies:
its broadcast axes are strides of 0.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..call import CallSpec
from ..errors import Reason

KINDS = frozenset({"bool", "bias"})


def keywords(mask: Tensor, query: Tensor, key: Tensor) -> dict[str, Any]:
    """What ``flash_attn_func`` takes for a mask.

    Args:
        mask: bool (True takes part) or floating point (added to the scaled scores), broadcastable to (B, H, Q, K).
        query: (B, Q, H, D). key: (B, K, G, D).
    """
    import cutlass
    from cutlass import cute
    from flash_attn.cute import utils

    keep, add = _functions(cutlass, cute, utils)
    batch, q_len, heads, _ = query.shape
    wide = mask.expand(batch, heads, q_len, key.shape[1])
    if mask.dtype == torch.bool:
        return {"mask_mod": keep, "aux_tensors": [_with_leading_axis(wide.view(torch.uint8))]}
    return {"score_mod": add, "aux_tensors": [_with_leading_axis(wide)]}


def _with_leading_axis(wide: Tensor) -> Tensor:
    """Name the axis of stride 1 where the DSL cannot tell it: a mask by distance, as a view, has two of them.

    ``wide`` must be a view made for this call, since the name is an attribute of the tensor object.
    """
    unit = [axis for axis, stride in enumerate(wide.stride()) if stride == 1]
    if len(unit) > 1 and sum(wide.shape[axis] > 1 for axis in unit) != 1:
        vars(wide)["__leading_dim__"] = unit[-1]
    return wide


@lru_cache(maxsize=4)
def _functions(cutlass: Any, cute: Any, utils: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    @cute.jit
    def keep(batch, head, row, column, lengths, aux):
        mask = aux[0]
        # The last tile of queries reaches beyond them, and is wrapped to them in the last tile of keys only.
        inside = min(row[0], mask.shape[2] - 1)
        return utils.scalar_to_ssa(mask[batch[0], head[0], inside, column[0]], cutlass.Uint8)

    @cute.jit
    def add(score, batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):
        bias = aux_tensors[0]
        inside = min(q_idx[0], bias.shape[2] - 1)
        found = cutlass.Float32(bias[batch[0], head[0], inside, kv_idx[0]])
        return score + utils.scalar_to_ssa(found, cutlass.Float32)

    return keep, add


def limits(spec: CallSpec) -> tuple[Reason, ...]:
    """What cannot be combined with such a mask."""
    if spec.mask not in KINDS:
        return ()
    reasons = []
    if spec.architecture.startswith("sm_10"):
        what = f"masks that depend on the query were checked on sm_90 only, not on {spec.architecture}"
        reasons.append(Reason("mask", what, "use backend='native' for this mask."))
    if spec.grad:
        what = "gradients through a mask that depends on the query are not supported"
        reasons.append(Reason("grad", what, "use backend='flex' or 'native', or call it under torch.no_grad()."))
    if spec.window:
        reasons.append(Reason("window", "a mask replaces its window", "put the window into the mask."))
    if spec.mask == "bias" and spec.softcap:
        what = "softcap together with an additive mask is not supported"
        reasons.append(Reason("softcap", what, "use backend='flex' or 'reference'."))
    return tuple(reasons)
