"""SageAttention 1.0.6 at any length: its Triton kernels hide nothing behind the last key.

https://pypi.org/project/sageattention/1.0.6/. The last block of 64 keys is filled up with keys and values of zero.

- Without causal masking each of them is counted with exp(0): the output comes out too small, by the share of the sum
  that belongs to real keys. The same call with values of one returns that share, so a second call repairs the first.
  Centred keys have a score of 0 or more in every row, which keeps the share above 1/64.
- With causal masking they are hidden, but blocks of 128 queries read one quantisation scale too many where the length
  is 1 to 64 beyond a multiple of 128: foreign memory, which may hold NaN. Padding to the multiple keeps it inside.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

KEY_BLOCK = 64
QUERY_BLOCK = 128


def dense(function: Callable, query: Tensor, key: Tensor, value: Tensor, scale: float, is_causal: bool) -> Tensor:
    """``sageattn`` on BSHD tensors, none of which is changed."""
    length = query.shape[1]
    key = key - key.mean(1, keepdim=True)
    if is_causal:
        query, key, value = (_filled(tensor) for tensor in (query, key, value))

    def run(value: Tensor) -> Tensor:
        return function(query, key, value, tensor_layout="NHD", is_causal=is_causal, sm_scale=scale, smooth_k=False)

    out = run(value)
    if is_causal:
        return out[:, :length]
    return out / run(torch.ones_like(value)) if key.shape[1] % KEY_BLOCK else out


def packed(
    function: Callable,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: tuple[Tensor, Tensor],
    longest: tuple[int, int],
    scale: float,
    is_causal: bool,
) -> Tensor:
    """``sageattn_varlen`` on packed sequences, none of which is changed.

    Args:
        starts: int32 starts of the queries and of the keys; read back, as the kernel does for its scales.
        longest: of the sequences of queries and of keys.
        is_causal: all sequences are as long as the longest.
    """
    bounds = starts[1].tolist()
    centred = key.clone()
    for start, end in pairwise(bounds):
        centred[start:end] -= key[start:end].mean(0, keepdim=True)
    key = centred
    length = longest[0]
    if is_causal:
        query, key, value = (_filled(tensor.unflatten(0, (-1, length))) for tensor in (query, key, value))
        filled = query.shape[1]
        query, key, value = (tensor.flatten(0, 1) for tensor in (query, key, value))
        starts, longest = (starts[0] // length * filled, starts[1] // length * filled), (filled, filled)

    def run(value: Tensor) -> Tensor:
        return function(
            query,
            key,
            value,
            cu_seqlens_q=starts[0],
            cu_seqlens_k=starts[1],
            max_seqlen_q=longest[0],
            max_seqlen_k=longest[1],
            is_causal=is_causal,
            sm_scale=scale,
            smooth_k=False,
        )

    out = run(value)
    if is_causal:
        return out.unflatten(0, (-1, longest[0]))[:, :length].flatten(0, 1)
    if any((end - start) % KEY_BLOCK for start, end in pairwise(bounds)):
        out = out / run(torch.ones_like(value))
    return out


def _filled(tensor: Tensor) -> Tensor:
    """(B, S, H, D) with S as causal kernels need it; the rows in addition are never seen by the others."""
    length = tensor.shape[1]
    missing = -length % QUERY_BLOCK if 0 < length % QUERY_BLOCK <= KEY_BLOCK else 0
    return F.pad(tensor, (0, 0, 0, 0, 0, missing)) if missing else tensor
