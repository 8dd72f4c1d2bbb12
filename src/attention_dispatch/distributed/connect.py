"""From a request and a registered backend to the pair of tensor functions that context parallelism runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .. import registry
from ..call import STANDARD_KWARGS, AttentionCall, CallSpec, architecture
from ..capabilities import row_for
from ..errors import InvalidCallError, Reason
from ..masks import Mask
from ..recording import record_parallel, recording
from ..registry import Backend
from ..request import Request
from ..resolve import candidates, extent_of, verdict_on
from .attention import context_parallel_attention
from .config import as_context_parallel
from .pair import BlockCall, BlockFacts, exact_backward
from .traced import traced_attention


class BackendPair:
    """A registered backend as an :class:`~.pair.AttentionPair`.

    Gradients of merged results come from ``Backend.backward``. An exact backend that only autograd can differentiate
    is differentiated in plain torch from its LSE: exact, but without the kernel's speed.
    """

    def __init__(self, backend: Backend, device: str):
        row = row_for(backend.capabilities, device)
        self._backend = backend
        self.name = backend.name
        self.differentiable = row is not None and row.gradients

    def reasons_against(self, query: Tensor, key: Tensor, value: Tensor, facts: BlockFacts) -> Sequence[Reason]:
        """See :meth:`~.pair.AttentionPair.reasons_against`."""
        return verdict_on(self.name, _spec(query, key, value, facts)).reasons

    def forward(self, query: Tensor, key: Tensor, value: Tensor, call: BlockCall) -> tuple[Tensor, Tensor | None]:
        """See :meth:`~.pair.AttentionPair.forward`."""
        output = self._backend.forward(_call(query, key, value, call))
        return output.out, output.lse

    def backward(
        self, grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, call: BlockCall
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See :meth:`~.pair.AttentionPair.backward`."""
        if self._backend.backward is None:
            return exact_backward(grad_out, query, key, value, out, lse, call)
        return self._backend.backward(grad_out, _call(query, key, value, call), out, lse)


def _call(query: Tensor, key: Tensor, value: Tensor, call: BlockCall) -> AttentionCall:
    mask = None if call.mask is None else Mask(call.mask_kind, call.mask)
    return AttentionCall(
        query,
        key,
        value,
        mask,
        0.0,
        call.is_causal,
        call.scale,
        query.shape[2] != key.shape[2],
        call.window_size,
        call.softcap,
        call.deterministic,
        call.needs_lse,
    )


def _spec(query: Tensor, key: Tensor, value: Tensor, facts: BlockFacts) -> CallSpec:
    device = query.device
    return CallSpec(
        device=device.type,
        architecture=architecture(device.type, device.index),
        dtype=query.dtype,
        head_dim=query.shape[3],
        head_dim_v=value.shape[3],
        heads=query.shape[2],
        kv_heads=key.shape[2],
        mask=facts.mask_kind,
        mask_per_head=False,
        mask_grad=False,
        is_causal=facts.is_causal,
        window=facts.has_window,
        softcap=facts.softcap,
        dropout=False,
        grad=facts.needs_grad,
        lse=facts.needs_lse,
        deterministic=facts.deterministic,
        lengths=facts.lengths,
        options=(),
    )


@lru_cache(maxsize=256)
def pair_named(name: str, device: str) -> BackendPair:
    """A registered backend on a device type."""
    return BackendPair(registry.get(name), device)


def names_for(request: Request, query: Tensor, key: Tensor, value: Tensor) -> tuple[str, ...]:
    """Candidates of a request in order: a demand has one, or those that stand for it where the LSE is needed."""
    facts = BlockFacts("none", False, False, "equal", False, False, True, False)
    local = AttentionCall(query, key, value, scale=1.0, enable_gqa=query.shape[2] != key.shape[2])
    names: list[str] = []
    for name in candidates(request, _spec(query, key, value, facts), extent_of(local)):
        names.append(name)
        with_lse = registry.get(name).with_lse
        if with_lse is not None:
            names += with_lse(local)
    return tuple(dict.fromkeys(names))


def pairs_for(request: Request, query: Tensor, key: Tensor, value: Tensor) -> tuple[BackendPair, ...]:
    """The candidates of :func:`names_for`.

    Raises:
        BackendUnavailableError: a demand whose backend cannot be used here.
    """
    if request.mode == "demand":
        registry.require(request.names[0])
    return tuple(pair_named(name, query.device.type) for name in names_for(request, query, key, value))


def arguments_of(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    enable_gqa: bool,
    attention_kwargs: Mapping[str, Any] | None,
    candidates_of: Callable[[], tuple[BackendPair, ...]],
) -> tuple[dict[str, Any], Callable[[], tuple[BackendPair, ...]]]:
    """The options of a call, and a function that finds its candidates or raises what is wrong with the call here."""
    given = dict(attention_kwargs or {})

    def find() -> tuple[BackendPair, ...]:
        unknown = sorted(set(given) - set(STANDARD_KWARGS))
        if unknown:
            raise InvalidCallError(
                f"attention_kwargs {unknown} are not passed on under context parallelism.\n"
                f"  Do:    use {', '.join(STANDARD_KWARGS)} only."
            )
        if query.shape[2] != key.shape[2] and not enable_gqa:
            raise InvalidCallError(f"query has {query.shape[2]} heads and key {key.shape[2]}: pass enable_gqa=True.")
        return candidates_of()

    options = {
        "window_size": given.get("window_size") or (-1, -1),
        "softcap": given.get("softcap") or 0.0,
        "deterministic": bool(given.get("deterministic")),
        "return_lse": bool(given.get("return_lse")),
    }
    return options, find


def dispatch_parallel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    attention_kwargs: Mapping[str, Any] | None,
    request: Request,
    parallel_config: Any,
) -> Any:
    """``dispatch_attention_fn`` with a ``parallel_config``: arguments and results of this rank's shard.

    Args:
        request: the request that counts for the call.
        parallel_config: see :func:`~.config.as_context_parallel`; must not be None.

    Raises:
        InvalidCallError: also for options of one backend (``attention_kwargs``), which are not passed on.
        BackendRejectedError, NoBackendError, PeerError: see :func:`~.attention.context_parallel_attention`.
    """
    parallel = as_context_parallel(parallel_config)
    assert parallel is not None
    request = request.for_lengths(query.shape[1], key.shape[1])
    options = dict(attention_kwargs or {})
    if torch.compiler.is_compiling():
        return traced_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, options, request, parallel
        )

    options, find = arguments_of(query, key, value, enable_gqa, options, lambda: pairs_for(request, query, key, value))
    names: list[str] = []
    result = context_parallel_attention(
        query,
        key,
        value,
        attn_mask,
        parallel=parallel,
        pair=find,
        request=str(request),
        dropout_p=dropout_p,
        is_causal=is_causal,
        scale=scale,
        **options,
        told=names.append,
    )
    if recording():
        record_parallel(
            query,
            key,
            attn_mask,
            str(request),
            names[0],
            f"shard {parallel.rank} of {parallel.world}: ring={parallel.ring}, ulysses={parallel.ulysses}",
        )
    return result
