"""The functions people call: `dispatch_attention_fn` (BSHD), `scaled_dot_product_attention` (BHSD) and `explain`."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor

from . import registry, settings
from .bound import Run, short_way
from .call import STANDARD_KWARGS, AttentionCall, AttentionOutput, CallSpec, canonicalise, check_output, spec_of
from .decision import Decision, decide
from .errors import InvalidCallError
from .graphs import TracedForwards, traced_choice
from .masks import runs_now
from .origin import origin_of
from .request import Request, current, environment, parsed
from .resolve import plan_for
from .tuning import store

# Calls seen before, by everything that is cheap to read from them: the function that runs them. Bounded, because
# lengths are part of the key; a miss costs a few microseconds, not a decision.
_bound: dict[Any, Run] = {}
_MAX_BOUND = 4096

_is_dynamo_compiling = torch.compiler.is_dynamo_compiling

registry._on_change.append(_bound.clear)
settings._on_change.append(_bound.clear)
store.on_change.append(_bound.clear)


def dispatch_attention_fn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    attention_kwargs: Mapping[str, Any] | None = None,
    *,
    backend: Any = None,
    parallel_config: Any = None,
) -> Any:
    """Scaled dot-product attention on the backend that was asked for; layout (batch, seq, heads, head_dim).

    Args:
        query: (B, Q, H, D), floating point.
        key: (B, K, G, D). value: (B, K, G, V). G = H, or a divisor of H with ``enable_gqa``.
        attn_mask: bool (True = attend) or additive float, of shape (Q, K), (B, K), (B, Q, K) or 4-D broadcastable to
            (B, H, Q, K); or a FlexAttention ``BlockMask``. None: no mask.
        dropout_p: probability in [0, 1) with which a weight is dropped.
        is_causal: query i sees keys j <= i, counted from the top left. With a mask, both apply.
        scale: factor of the scores; None is 1 / sqrt(D).
        enable_gqa: allow fewer key than query heads.
        attention_kwargs: ``return_lse`` (bool), ``window_size`` ((left, right), -1 unbounded), ``softcap`` (float),
            ``deterministic`` (bool), and options of the backend named in its documentation.
        backend: a name, a sequence of names, ``"auto"`` or ``"auto_quantized"``; None takes the nearest setting:
            the model's, the ``with attention_backend(...)`` scope, the environment, ``"native"``.
        parallel_config: context parallelism; None computes on this process alone.

    Returns:
        (B, Q, H, V) in the dtype of query; with ``return_lse`` a pair with the log-sum-exp, natural log, float32,
        (B, H, Q), detached. A query that may attend to no key gets 0 and -inf.

    Raises:
        InvalidCallError: the arguments contradict each other or the contract.
        UnknownBackendError, BackendUnavailableError, BackendRejectedError, NoBackendError: see ``errors``.

    Example:
        >>> import torch, attention_dispatch as ad
        >>> q, k, v = (torch.randn(2, 16, 4, 64) for _ in range(3))
        >>> ad.dispatch_attention_fn(q, k, v, is_causal=True, backend=["flash", "native"]).shape
        torch.Size([2, 16, 4, 64])
    """
    if attention_kwargs is None and parallel_config is None and not _is_dynamo_compiling():
        try:
            if attn_mask is None:
                return _bound[
                    query.shape, key.shape, value.shape, query.dtype, query.device,
                    dropout_p, is_causal, scale, enable_gqa, backend, current.fields["effective"],
                ](query, key, value)  # fmt: skip
            return _bound[
                query.shape, key.shape, value.shape, query.dtype, query.device,
                dropout_p, is_causal, scale, enable_gqa, backend, current.fields["effective"],
                attn_mask.shape, attn_mask.dtype,
            ](query, key, value, attn_mask)  # fmt: skip
        except (KeyError, TypeError, AttributeError, RuntimeError, AssertionError):
            # Not seen before, or not as the kernel needs it, or the caller's mistake: the long way tells.
            if isinstance(backend, list):
                # A list cannot be a key; asked only now, because every call would pay for the question.
                return dispatch_attention_fn(
                    query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, backend=tuple(backend)
                )
    return _dispatch(
        query,
        key,
        value,
        attn_mask,
        dropout_p,
        is_causal,
        scale,
        enable_gqa,
        attention_kwargs,
        backend,
        parallel_config,
    )


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    backend: Any = None,
    attention_kwargs: Mapping[str, Any] | None = None,
) -> Any:
    """:func:`dispatch_attention_fn` with the signature and layout of torch's function: (batch, heads, seq, head_dim).

    Example:
        >>> import torch, attention_dispatch as ad
        >>> q, k, v = (torch.randn(2, 4, 16, 64) for _ in range(3))
        >>> ad.scaled_dot_product_attention(q, k, v, is_causal=True).shape
        torch.Size([2, 4, 16, 64])
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor) or tensor.ndim != 4:
            shape = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise InvalidCallError(f"{name} must be a 4-D tensor (batch, heads, seq, head_dim), got {shape}.")
    result = dispatch_attention_fn(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask,
        dropout_p,
        is_causal,
        scale,
        enable_gqa,
        attention_kwargs,
        backend=backend,
    )
    if isinstance(result, tuple):
        return result[0].transpose(1, 2), result[1]
    return result.transpose(1, 2)


def explain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    attention_kwargs: Mapping[str, Any] | None = None,
    *,
    backend: Any = None,
    module: torch.nn.Module | None = None,
    device: str | torch.device | None = None,
    parallel_config: Any = None,
) -> Decision | Any:
    """Which backend would run a call, why, and why not each other one. Computes nothing.

    Takes the arguments of :func:`dispatch_attention_fn`.

    Args:
        module: explain the call as if the forward of this module made it: the module's setting counts.
        device: plan for this device; None takes the tensors' own, and for tensors on ``meta`` the accelerator of this
            machine, or the CPU if there is none.
        parallel_config: context parallelism; every rank has to ask, as every rank has to call.

    Returns:
        A :class:`~attention_dispatch.decision.Decision`, or with a ``parallel_config`` a
        :class:`~attention_dispatch.distributed.ParallelDecision`; ``str()`` of either is readable.

    Example:
        >>> import torch, attention_dispatch as ad
        >>> q = torch.empty(1, 4096, 24, 128, dtype=torch.bfloat16, device="meta")
        >>> ad.explain(q, q, q, backend=["flash", "native"], device="cpu").backend
        'native'
    """
    wanted, origin = request_for(backend), origin_of(backend)
    if module is not None and backend is None:
        from .routing import request_in

        wanted, origin = request_in(module) or (wanted, origin)
    if parallel_config is not None:
        from .distributed import as_context_parallel, explain_parallel

        parallel = as_context_parallel(parallel_config)
        if parallel is not None:
            if device is not None:
                raise InvalidCallError("explain takes a device or a parallel_config, not both.")
            return explain_parallel(
                query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, attention_kwargs,
                wanted, parallel,
            )  # fmt: skip
    call = _canonical(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, attention_kwargs)
    return decide(call, wanted.for_lengths(call.query.shape[1], call.key.shape[1]), device, origin)


def request_for(backend: Any) -> Request:
    """The request that counts for a call of this thread: its own, or the nearest setting."""
    if backend is not None:
        return parsed(backend)
    state = current.state
    request: Request | None = state.model or state.scope
    return environment() if request is None else request


def _canonical(query: Any, key: Any, value: Any, attn_mask: Any, dropout_p: Any, is_causal: Any, scale: Any, enable_gqa: Any, attention_kwargs: Any) -> AttentionCall:  # fmt: skip
    options: frozenset[str] = frozenset()
    if isinstance(attention_kwargs, Mapping) and not all(name in STANDARD_KWARGS for name in attention_kwargs):
        options = registry.known_options()
    return canonicalise(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, attention_kwargs, options
    )


def _dispatch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    attention_kwargs: Mapping[str, Any] | None,
    backend: Any,
    parallel_config: Any,
) -> Any:
    """The long way: validate, decide or remember the decision, run."""
    if parallel_config is None:
        parallel_config = current.state.fields.get("parallel")
    if parallel_config is not None:
        from .distributed import as_context_parallel, dispatch_parallel

        parallel = as_context_parallel(parallel_config)
        if parallel is not None:
            return dispatch_parallel(
                query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, attention_kwargs,
                request_for(backend), parallel,
            )  # fmt: skip
    checks = settings.checks()
    if checks and attn_mask is not None and is_causal:
        raise InvalidCallError(
            "attn_mask together with is_causal=True (checks are on). Merge them into one mask, or switch the checks off."
        )
    call = _canonical(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, attention_kwargs)
    request = request_for(backend).for_lengths(call.query.shape[1], call.key.shape[1])
    spec = spec_of(call)
    if call.key.shape[1] == 0 or call.query.numel() == 0:
        # Traced too: aten flash ends the process with a floating point exception (torch 2.13, CPU).
        output = _without_keys(call)
    elif torch.compiler.is_compiling():
        output = getattr(TracedForwards, traced_choice(request.mode, request.names, *spec))(call)
    else:
        began = store.generation()
        plan = plan_for(request, spec, call)
        output = plan.backend.forward(call)
        check_output(plan.backend.name, call, output)
        if checks == "numerics":
            from .numerics import shadow_check

            shadow_check(call, spec, plan, output)
        if current.state.observer is not None:
            output = current.state.observer(call, spec, request, plan, output)
        elif attention_kwargs is None and not checks and _repeats(call, query, attn_mask, spec, backend):
            bound: tuple[Any, ...] = (
                query.shape, key.shape, value.shape, query.dtype, query.device,
                dropout_p, is_causal, scale, enable_gqa, backend, current.fields["effective"],
            )  # fmt: skip
            if attn_mask is not None:
                bound += (attn_mask.shape, attn_mask.dtype)
            run = short_way(plan, request, call, spec, _bound.get(bound))
            if len(_bound) >= _MAX_BOUND:
                _bound.clear()
            _bound[bound] = run
            if store.generation() != began:
                # Another thread changed what choices rest on after this one was made.
                _bound.pop(bound, None)
    return (output.out, output.lse) if call.return_lse else output.out


def _repeats(call: AttentionCall, query: Tensor, attn_mask: Any, spec: CallSpec, backend: Any) -> bool:
    """Whether the next call like this one can be known by its arguments: nothing was cast, and all can be a key."""
    mask_says = attn_mask is None or (call.mask is not None and call.mask.tensor is not None and not spec.mask_grad)
    return mask_says and call.query is query and isinstance(backend, Hashable) and runs_now(query)


def _without_keys(call: AttentionCall) -> AttentionOutput:
    """No keys, or nothing to compute: every row is empty."""
    query = call.query
    # Sums of nothing keep the output in the graph, and are 0 whatever the tensors hold.
    nothing = query[:0].sum() + call.key[:0].sum() + call.value[:0].sum()
    out = query.new_zeros((*query.shape[:3], call.value.shape[3])) + nothing
    lse = None
    if call.return_lse:
        batch, q_len, heads, _ = query.shape
        lse = torch.full((batch, heads, q_len), float("-inf"), dtype=torch.float32, device=query.device)
    return AttentionOutput(out, lse)
