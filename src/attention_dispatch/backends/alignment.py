"""Top-left causal masking of any lengths, on kernels that align it to the bottom right or take equal lengths only."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .. import adapt
from ..call import FULL_WINDOW, AttentionCall, AttentionOutput, CallSpec

SPLIT = "split_queries"


def _joined_bytes(call: AttentionCall) -> int:
    batch, q_len, heads, _ = call.query.shape
    return batch * q_len * heads * call.value.shape[3] * call.query.element_size()


adapt.ADAPTERS[SPLIT] = adapt.Adapter("computes the queries beyond the last key apart, and joins both", _joined_bytes)


def any_lengths(forward: Callable[[AttentionCall], AttentionOutput]) -> Callable[[AttentionCall], AttentionOutput]:
    """``forward`` of a kernel that serves causal masking for Q <= K, extended to Q > K.

    The first K queries against the K keys are the square that every alignment agrees on; the others see all keys.
    """

    def split(call: AttentionCall) -> AttentionOutput:
        k_len = call.key.shape[1]
        if not call.is_causal or call.window_size != FULL_WINDOW or call.query.shape[1] <= k_len:
            return forward(call)
        square = forward(call.replaced(query=call.query[:, :k_len]))
        others = forward(call.replaced(query=call.query[:, k_len:], is_causal=False))
        lse = None
        if square.lse is not None and others.lse is not None:
            lse = torch.cat([square.lse, others.lse], 2)
        return AttentionOutput(torch.cat([square.out, others.out], 1), lse)

    return split


def splits(spec: CallSpec) -> bool:
    """Whether calls with these facts are computed in two parts."""
    return spec.is_causal and spec.lengths == "more_queries" and not spec.window
