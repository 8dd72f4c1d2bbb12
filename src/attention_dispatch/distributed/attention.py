"""Attention over a sequence that several ranks hold, with any kernel that is given as a pair of tensor functions."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import InvalidCallError
from .agreement import CallFacts, float_bits
from .config import LAYOUTS, ContextParallel
from .execute import Execution
from .merge import accumulation_dtype
from .pair import AttentionPair
from .plan import CallOptions, Plan
from .sharded_mask import ShardedMask
from .survey import chosen

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.bool)


def context_parallel_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    parallel: ContextParallel,
    pair: AttentionPair | Callable[[], Sequence[AttentionPair]],
    request: str = "",
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
    return_lse: bool = False,
    told: Callable[[str], object] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of this rank's queries to the keys of all ranks.

    Every rank calls it with its shard of the sequence. Causality and the window count tokens of the whole sequence.

    Args:
        query: (B, my query tokens, Hq, D).
        key: (B, my key tokens, Hkv, D), Hq a multiple of Hkv.
        value: (B, my key tokens, Hkv, Dv).
        attn_mask: bool (True attends) or additive float; see :func:`~.sharded_mask.read_masks`: key padding (B, Sk)
            of this rank's or of all keys, or a mask that broadcasts to (B, Hq, Sq, Sk) with this rank's or all query
            rows against all keys.
        parallel: the ranks.
        pair: the kernel, or a function that finds candidates in order of preference; what it raises is raised on
            every rank. The first of rank 0's candidates that can serve every rank is taken, once for each kind of call.
        request: what the candidates were chosen by; must be the same on every rank.
        dropout_p: must be 0.
        is_causal: token i sees tokens j <= i, top-left aligned.
        scale: None is 1 / sqrt(D).
        window_size: token i sees ``i - left <= j <= i + right``; -1 is unbounded.
        softcap: 0 is off.
        deterministic: passed to the kernel.
        return_lse: also return the LSE.
        told: called with the name of the kernel that was taken.

    Returns:
        out (B, my query tokens, Hq, Dv); with ``return_lse`` also lse (B, Hq, my query tokens), natural log, float32
        (float64 for float64), without gradient.

    Raises:
        InvalidCallError: the call is wrong, or differs between the ranks.
        BackendRejectedError: the kernel cannot serve it. Nothing was sent.
        PeerError: another rank refused or failed.
    """
    calls, kernels, options = open_call(
        query,
        key,
        value,
        attn_mask,
        parallel,
        pair,
        request,
        dropout_p,
        is_causal,
        scale,
        window_size=window_size,
        softcap=softcap,
        deterministic=deterministic,
        return_lse=return_lse,
    )
    plan, kernel = chosen(parallel, kernels, calls, (query, key, value), attn_mask, options)
    if told is not None:
        told(kernel.name)
    mask = None if attn_mask is None else _shard_mask(parallel, plan, attn_mask)
    agreement = parallel.agreement if parallel.agree_always else None
    run = Execution(plan, kernel, mask, agreement, parallel.ulysses_rank)
    if options.needs_grad:
        out, lse = _Attention.apply(query, key, value, run, plan)
    else:
        out, lse, _ = run.forward(query, key, value)
    return (out, lse) if return_lse else out


def open_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    parallel: ContextParallel,
    pair: AttentionPair | Callable[[], Sequence[AttentionPair]],
    request: str,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    *,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
    return_lse: bool = False,
) -> tuple[tuple[CallFacts, ...], tuple[AttentionPair, ...], CallOptions]:
    """Every rank's facts, this rank's candidates and the options; arguments and errors as for the call."""
    error: Exception | None = None
    facts = options = None
    kernels: tuple[AttentionPair, ...] = ()
    try:
        kernels = tuple(pair()) if callable(pair) else (pair,)
        _check(query, key, value, attn_mask, dropout_p)
        scale = 1.0 / math.sqrt(query.shape[3]) if scale is None else float(scale)
        needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
        window = (window_size[0], window_size[1])
        options = CallOptions(scale, float(softcap), deterministic, is_causal, window, needs_grad, return_lse)
        facts = _facts(query, key, value, attn_mask, options, parallel, request or kernels[0].name)
    except Exception as caught:
        error = caught
    calls = _agree(parallel, facts, error)
    assert options is not None
    return calls, kernels, options


class _Attention(torch.autograd.Function):
    """One call as one node of the graph: what the kernels returned is saved, and nothing is computed again."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, run: Execution, plan: Plan) -> Any:
        out, lse, saved = run.forward(query, key, value)
        ctx.run, ctx.plan, ctx.own = run, plan, not saved
        if not plan.by_autograd:
            ctx.save_for_backward(*(saved or (query, key, value, out, lse)))
        ctx.shapes = [(tensor.shape, tensor.dtype) for tensor in (query, key, value)]
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor, _: Any) -> Any:
        plan, tensors = ctx.plan, ctx.saved_tensors

        def chunk_tensors(chunk: int) -> tuple[Tensor, ...]:
            if plan.by_autograd:
                return ctx.run.recorded(chunk)
            if not ctx.own:
                return tensors[5 * chunk : 5 * chunk + 5]
            heads = plan.chunks[chunk][0]
            query, key, value, out, lse = tensors
            q, kv = slice(*heads.queries), slice(*heads.keys)
            return query[:, :, q], key[:, :, kv], value[:, :, kv], out[:, :, q], lse[:, q]

        gradients = []
        for index, (shape, dtype) in enumerate(ctx.shapes):
            shared = plan.replicated and index > 0
            # Copies of a key head are summed, in the accumulation dtype.
            gradients.append(
                torch.zeros(shape, dtype=accumulation_dtype(dtype), device=grad_out.device)
                if shared
                else torch.empty(shape, dtype=dtype, device=grad_out.device)
            )
        ctx.run.backward(grad_out, chunk_tensors, tuple(gradients))
        return (*(gradient.to(dtype) for gradient, (_, dtype) in zip(gradients, ctx.shapes)), None, None)


def _check(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout_p: float) -> None:
    """The caller's mistakes that one rank can see alone."""
    if any(tensor.ndim != 4 for tensor in (query, key, value)):
        raise InvalidCallError("query, key and value must be (batch, tokens, heads, head_dim)")
    if key.shape[:3] != value.shape[:3] or key.shape[0] != query.shape[0] or key.shape[3] != query.shape[3]:
        raise InvalidCallError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)} do not belong together"
        )
    if key.shape[2] == 0 or query.shape[2] % key.shape[2]:
        raise InvalidCallError(f"{query.shape[2]} query heads are not a multiple of {key.shape[2]} key heads")
    if len({(tensor.dtype, tensor.device) for tensor in (query, key, value)}) > 1:
        raise InvalidCallError("query, key and value must share dtype and device")
    if query.dtype not in _DTYPES:
        raise InvalidCallError(f"dtype {query.dtype} is not supported under context parallelism")
    if dropout_p:
        raise InvalidCallError(
            f"dropout_p={dropout_p} under context parallelism: the ranks would draw masks that no single process "
            "draws.\n  Do:    pass dropout_p=0.0, or apply dropout outside attention."
        )
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        raise InvalidCallError(
            f"attn_mask of type {type(mask).__name__} cannot be divided between ranks.\n"
            "  Do:    pass a tensor, or express it by is_causal, window_size and a key-padding mask."
        )
    if mask.ndim not in (2, 3, 4) or not (mask.dtype == torch.bool or mask.is_floating_point()):
        raise InvalidCallError(
            f"attn_mask must be bool or floating point with 2 to 4 dimensions, got {mask.dtype} "
            f"of shape {tuple(mask.shape)}"
        )
    if mask.device != query.device:
        raise InvalidCallError(f"attn_mask is on {mask.device}, query on {query.device}")
    if mask.requires_grad and torch.is_grad_enabled():
        raise InvalidCallError(
            "gradients of attn_mask are not supported under context parallelism.\n"
            "  Do:    detach the mask, or compute the call on one process."
        )


def _facts(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    options: CallOptions,
    parallel: ContextParallel,
    request: str,
) -> CallFacts:
    sizes = () if mask is None else tuple(mask.shape)
    return CallFacts(
        batch=query.shape[0],
        query_tokens=query.shape[1],
        key_tokens=key.shape[1],
        query_heads=query.shape[2],
        key_heads=key.shape[2],
        head_dim=query.shape[3],
        value_head_dim=value.shape[3],
        dtype=_DTYPES.index(query.dtype),
        is_causal=int(options.is_causal),
        window_left=options.window[0],
        window_right=options.window[1],
        scale=float_bits(options.scale),
        softcap=float_bits(options.softcap),
        deterministic=int(options.deterministic),
        return_lse=int(options.return_lse),
        needs_grad=int(options.needs_grad),
        mask_dims=len(sizes),
        **{f"mask_size_{index}": (*sizes, -1, -1, -1, -1)[index] for index in range(4)},
        mask_dtype=-1 if mask is None else int(mask.dtype == torch.bool),
        layout=LAYOUTS.index(parallel.layout),
        head_chunks=parallel.head_chunks or 0,
        backend=zlib.crc32(request.encode()),
    )


def _agree(parallel: ContextParallel, facts: CallFacts | None, error: Exception | None) -> tuple[CallFacts, ...]:
    if not parallel.agree_always and error is None and facts in parallel.agreed:
        return parallel.agreed[facts]
    calls = parallel.agreement.open(facts, error)
    if not parallel.agree_always:
        parallel.agreed[facts] = calls
    return calls


def _shard_mask(parallel: ContextParallel, plan: Plan, mask: Tensor) -> ShardedMask:
    assert plan.mask_form is not None
    return ShardedMask(
        mask,
        plan.mask_form,
        plan.kv_layout,
        parallel.group,
        (parallel.ulysses_group, plan.q_exchange.layout, plan.queries),
    )
