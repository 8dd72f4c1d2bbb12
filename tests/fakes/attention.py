"""Attention in float64, and the packed-sequence loop the varlen fakes share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    allowed: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    empty_lse: float = float("-inf"),
) -> tuple[Tensor, Tensor]:
    """Attention of BHSD tensors, KV heads repeated as needed.

    Args:
        allowed: bool, broadcastable to (B, H, Sq, Sk), True = attend.
        bias: float, broadcastable to (B, H, Sq, Sk), added after ``softcap``.
        empty_lse: LSE of a row with no key. Its output is 0.

    Returns:
        Output in the query's dtype (B, H, Sq, Dv), and LSE float32 natural log (B, H, Sq).
    """
    ratio = query.shape[1] // key.shape[1]
    keys = key.double().repeat_interleave(ratio, 1)
    values = value.double().repeat_interleave(ratio, 1)
    scores = query.double() @ keys.transpose(-1, -2) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.double()
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
    empty = ~(scores > float("-inf")).any(-1, keepdim=True) if scores.shape[-1] else scores.new_ones(()).bool()
    empty = empty.expand(*scores.shape[:-1], 1)
    scores = scores.masked_fill(empty, 0.0)
    lse = torch.logsumexp(scores, -1).masked_fill(empty.squeeze(-1), empty_lse)
    weights = torch.softmax(scores, -1).masked_fill(empty, 0.0)
    if dropout_p:
        weights = torch.nn.functional.dropout(weights, dropout_p)
    return (weights @ values).to(query.dtype), lse.float()


def band(query_length: int, key_length: int, left: int, right: int, offset: int = 0) -> Tensor:
    """Bool (Sq, Sk): query i sees keys i + offset - left … i + offset + right; a negative bound is no bound."""
    distance = torch.arange(key_length)[None, :] - torch.arange(query_length)[:, None] - offset
    allowed = torch.ones(query_length, key_length, dtype=torch.bool)
    if left >= 0:
        allowed &= distance >= -left
    if right >= 0:
        allowed &= distance <= right
    return allowed


class _UnwrittenTail(torch.autograd.Function):
    """Identity whose gradient beyond ``used`` rows is NaN, as a kernel leaves ``torch.empty`` rows unwritten."""

    @staticmethod
    def forward(ctx, tensor: Tensor, used: Tensor) -> Tensor:
        ctx.save_for_backward(used)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        (used,) = ctx.saved_tensors
        return gradient.masked_fill(~used.view(-1, *[1] * (gradient.dim() - 1)), float("nan")), None


def packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_starts: Tensor,
    key_starts: Tensor,
    longest_query: int,
    longest_key: int,
    one_sequence: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
    used_keys: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Run ``one_sequence`` (BHSD in and out, batch 1) over packed (T, H, D) sequences.

    Rows that belong to no sequence come back as NaN, in the output and in the gradients of key and value.

    Returns:
        Output (Tq, H, Dv) and LSE (H, Tq).
    """
    _check_starts(query_starts, query.shape[0], longest_query, "q")
    _check_starts(key_starts, key.shape[0], longest_key, "k")
    if len(query_starts) != len(key_starts):
        raise RuntimeError("cu_seqlens_q and cu_seqlens_k must describe the same number of sequences")
    starts = key_starts.tolist()
    ends = starts[1:] if used_keys is None else [start + n for start, n in zip(starts[:-1], used_keys, strict=True)]
    used = torch.zeros(key.shape[0], dtype=torch.bool)
    for start, end in zip(starts[:-1], ends, strict=True):
        used[start:end] = True
    key, value = _UnwrittenTail.apply(key, used), _UnwrittenTail.apply(value, used)
    outputs, lses, rows = [], [], query_starts.tolist()
    for index, (start, end) in enumerate(zip(starts[:-1], ends, strict=True)):
        tensors = query[rows[index] : rows[index + 1]], key[start:end], value[start:end]
        output, lse = one_sequence(*(tensor.transpose(0, 1)[None] for tensor in tensors))
        outputs.append(output[0].transpose(0, 1))
        lses.append(lse[0])
    missing = query.shape[0] - rows[-1]
    outputs.append(query.new_full((missing, query.shape[1], value.shape[2]), float("nan")))
    lses.append(torch.full((query.shape[1], missing), float("nan")))
    return torch.cat(outputs), torch.cat(lses, 1)


def _check_starts(starts: Tensor, total: int, longest: int, name: str) -> None:
    if starts.dtype != torch.int32 or not starts.is_contiguous() or starts.dim() != 1:
        raise RuntimeError(f"cu_seqlens_{name} must be a contiguous 1-D int32 tensor")
    lengths = starts.diff()
    if starts[0] != 0 or (lengths < 0).any() or starts[-1] > total:
        raise RuntimeError(f"cu_seqlens_{name} does not describe {total} rows: {starts.tolist()}")
    if type(longest) is not int or lengths.max() > longest:
        raise RuntimeError(f"max_seqlen_{name}={longest!r} must be an int no smaller than {int(lengths.max())}")
