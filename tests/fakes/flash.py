"""FlashAttention 2, 3 and 4: bottom-right alignment, packed sequences, and what each returns."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import torch
from torch import Tensor

from contracts import FunctionContract
from fakes.attention import attend, band, packed

HALF = (torch.float16, torch.bfloat16)


def flash_2(contract: FunctionContract, record: str, call: SimpleNamespace) -> object:
    """FA2: the LSE of an empty row is +inf, and the gradient of the LSE is ignored."""
    _check(call, same_value_dim=True)
    if call.dropout_p and call.softcap:
        raise RuntimeError("Softcapping does not support dropout for now")
    if call.alibi_slopes is not None:
        raise NotImplementedError("the fake has no ALiBi")
    out, lse = _run(call, call.window_size, call.dropout_p, empty_lse=float("inf"))
    return (out, lse.detach(), None) if call.return_attn_probs else out


def flash_3(contract: FunctionContract, record: str, call: SimpleNamespace) -> object:
    """FA3: three return conventions, told apart by the record."""
    _check(call, same_value_dim=False)
    head_dim, value_dim = call.q.shape[-1], call.v.shape[-1]
    if head_dim != value_dim and not (
        (128 < head_dim <= 192 and 96 < value_dim <= 128) or (head_dim <= 64 and value_dim <= 512)
    ):
        raise RuntimeError(f"head dimensions {head_dim} and {value_dim} are not supported together")
    _multiple_of_8(head_dim, value_dim)
    _untouched(call, "qv", "q_descale", "k_descale", "v_descale")
    out, lse = _run(call, call.window_size)
    if contract.convention == "tuple" or (contract.convention == "either" and call.return_attn_probs):
        return out, lse.detach()
    return out


def flash_4(contract: FunctionContract, record: str, call: SimpleNamespace) -> object:
    """FA4: always a pair, the LSE only when asked for or needed; unbounded windows are None, not -1."""
    _check(call, same_value_dim=False)
    _multiple_of_8(call.q.shape[-1], call.v.shape[-1])
    _untouched(call, "qv", "learnable_sink", "page_table", "block_sparse_tensors")
    mask_mod, score_mod = getattr(call, "mask_mod", None), getattr(call, "score_mod", None)
    if call.softcap and score_mod is not None:
        raise AssertionError("softcap and score_mod cannot be used together")
    if any(bound is not None and bound < 0 for bound in call.window_size):
        raise RuntimeError(f"window_size={call.window_size}: an unbounded side is None")
    window = tuple(-1 if bound is None else bound for bound in call.window_size)
    if mask_mod is not None or score_mod is not None:
        # mask_mod takes the place of both.
        window = (-1, -1) if mask_mod is not None else window
        out, lse = _run(call, window, bias=_of_functions(call))
    else:
        out, lse = _run(call, window)
    needs_lse = call.return_lse or any(tensor.requires_grad for tensor in (call.q, call.k, call.v))
    return out, lse if needs_lse else None


def _of_functions(call: SimpleNamespace) -> Tensor:
    """What mask_mod and score_mod add to the scores (B, H, Q, K); rows of a tile that end beyond the queries are asked too."""
    (batch, q_len, heads, _), k_len = call.q.shape, call.k.shape[1]
    for tensor in call.aux_tensors:
        _has_a_leading_axis(tensor)
    added = torch.zeros(batch, heads, q_len, k_len, dtype=torch.float64)
    for b, h, row, column in itertools.product(range(batch), range(heads), range(q_len + 1), range(k_len)):
        place = [b], [h], [row], [column]
        found = 0.0
        if call.score_mod is not None:
            found = call.score_mod(
                torch.zeros(1),
                *place[:2],
                q_idx=place[2],
                kv_idx=place[3],
                seqlen_info=None,
                aux_tensors=call.aux_tensors,
            )[0].item()
        if call.mask_mod is not None and not bool(call.mask_mod(*place, None, call.aux_tensors)[0]):
            found = float("-inf")
        if row < q_len:
            added[b, h, row, column] = found
    return added


def _has_a_leading_axis(tensor: Tensor) -> None:
    """Which axis has stride 1 must be plain, or be said by the caller in ``__leading_dim__``."""
    named = getattr(tensor, "__leading_dim__", None)
    if named is not None:
        if tensor.stride(named) != 1:
            raise ValueError(f"__leading_dim__ {named} has stride {tensor.stride(named)}, not 1")
        return
    unit = [axis for axis, stride in enumerate(tensor.stride()) if stride == 1]
    if len(unit) > 1 and sum(tensor.shape[axis] > 1 for axis in unit) != 1:
        raise ValueError(f"no unique stride-1 leading dimension in strides {tensor.stride()}")


def _run(
    call: SimpleNamespace,
    window: tuple[int, int],
    dropout_p: float = 0.0,
    empty_lse: float = float("-inf"),
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    scale = call.q.shape[-1] ** -0.5 if call.softmax_scale is None else call.softmax_scale
    left, right = window
    right = 0 if call.causal else right

    def one_sequence(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        allowed = band(query.shape[2], key.shape[2], left, right, offset=key.shape[2] - query.shape[2])
        return attend(
            query,
            key,
            value,
            scale=scale,
            allowed=allowed,
            softcap=call.softcap,
            dropout_p=dropout_p,
            empty_lse=empty_lse,
            bias=bias,
        )

    if getattr(call, "cu_seqlens_q", None) is None:
        out, lse = one_sequence(*(tensor.transpose(1, 2) for tensor in (call.q, call.k, call.v)))
        return out.transpose(1, 2), lse
    used = getattr(call, "seqused_k", None)
    _untouched(call, "seqused_q", "block_table")
    return packed(
        call.q,
        call.k,
        call.v,
        call.cu_seqlens_q,
        call.cu_seqlens_k,
        call.max_seqlen_q,
        call.max_seqlen_k,
        one_sequence,
        None if used is None else _used(used),
    )


def _used(used: Tensor) -> list[int]:
    if used.dtype != torch.int32 or used.dim() != 1:
        raise RuntimeError("seqused_k must be a 1-D int32 tensor")
    return used.tolist()


def _check(call: SimpleNamespace, same_value_dim: bool) -> None:
    tensors = call.q, call.k, call.v
    if any(tensor.dtype not in HALF or tensor.dtype != call.q.dtype for tensor in tensors):
        raise RuntimeError(f"FlashAttention only supports fp16 and bf16, alike: {[t.dtype for t in tensors]}")
    rank = 3 if getattr(call, "cu_seqlens_q", None) is not None else 4
    if any(tensor.dim() != rank for tensor in tensors):
        raise RuntimeError(f"q, k and v must have {rank} axes")
    if call.q.shape[-1] > 256 or call.k.shape[-1] != call.q.shape[-1]:
        raise RuntimeError(f"head dimension {call.q.shape[-1]} / {call.k.shape[-1]}")
    if same_value_dim and call.v.shape[-1] != call.q.shape[-1]:
        raise RuntimeError("v must have the head dimension of q")
    if call.q.shape[-2] % call.k.shape[-2] or call.k.shape[:-1] != call.v.shape[:-1]:
        raise RuntimeError("Number of heads in key/value must divide number of heads in query")
    if any(tensor.stride(-1) != 1 for tensor in tensors):
        raise RuntimeError("Input tensor must have contiguous last dimension")


def _multiple_of_8(*head_dims: int) -> None:
    if any(head_dim % 8 for head_dim in head_dims):
        raise RuntimeError(f"head_size should be a multiple of 8, got {head_dims}")


def _untouched(call: SimpleNamespace, *names: str) -> None:
    for name in names:
        if getattr(call, name, None) is not None:
            raise NotImplementedError(f"the fake has no {name}")
