"""Ulysses inside ``torch.compile``: functional collectives around an ordinary dispatched call.

What cannot be traced is refused: rings (point-to-point transfers), shards or head counts that differ between ranks
(their sizes would have to be exchanged while tracing), and masks other than key padding of all keys. The agreement
between ranks is left out: equal graphs on all ranks are the caller's responsibility, as for any compiled collective.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single_autograd

from ..errors import InvalidCallError
from ..request import Request
from .config import LOCAL, ContextParallel


def traced_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    options: dict[str, Any],
    request: Request,
    parallel: ContextParallel,
) -> Any:
    """Arguments and result as ``dispatch_parallel``.

    Raises:
        InvalidCallError: see the module's description.
    """
    from ..api import dispatch_attention_fn

    world = parallel.ulysses
    if parallel.ring != 1 or parallel.layout != "contiguous" or options.get("return_lse") or dropout_p:
        raise InvalidCallError(
            "under torch.compile context parallelism serves Ulysses with contiguous shards, without return_lse and "
            "dropout.\n  Do:    use ulysses=N, ring=1, or call the attention outside the compiled region."
        )
    if query.shape[2] % world or key.shape[2] % world:
        raise InvalidCallError(
            f"under torch.compile {query.shape[2]} query and {key.shape[2]} key heads must be "
            f"multiples of the {world} ranks.\n  Do:    call the attention outside the graph."
        )
    if attn_mask is not None and attn_mask.shape[-1] != key.shape[1] * world:
        raise InvalidCallError(
            "under torch.compile attn_mask must be key padding over the keys of all ranks.\n"
            "  Do:    pass (B, Sk) with the global Sk, or call the attention outside the graph."
        )
    if attn_mask is not None and attn_mask.ndim == 2:
        attn_mask = attn_mask[:, None, None, :]
    if attn_mask is not None and (attn_mask.shape[-3] != 1 or attn_mask.shape[-2] != 1):
        raise InvalidCallError(
            "under torch.compile attn_mask must not depend on the query or head.\n"
            "  Do:    call the attention outside the compiled region."
        )
    if world > 1:
        query, key, value = (_to_heads(tensor, world, parallel) for tensor in (query, key, value))
    out = dispatch_attention_fn(
        query,
        key,
        value,
        attn_mask,
        0.0,
        is_causal,
        scale,
        enable_gqa,
        options or None,
        backend=request,
        parallel_config=LOCAL,
    )
    return _to_tokens(out, world, parallel) if world > 1 else out


def _to_heads(tensor: Tensor, world: int, parallel: ContextParallel) -> Tensor:
    batch, tokens, heads, head_dim = tensor.shape
    by_rank = tensor.view(batch, tokens, world, heads // world, head_dim).permute(2, 1, 0, 3, 4).contiguous()
    even = [tokens] * world
    group = parallel.ulysses_group
    assert group is not None
    received = all_to_all_single_autograd(by_rank.flatten(0, 1), even, even, group)
    return received.transpose(0, 1)


def _to_tokens(tensor: Tensor, world: int, parallel: ContextParallel) -> Tensor:
    batch, total, heads, head_dim = tensor.shape
    even = [total // world] * world
    group = parallel.ulysses_group
    assert group is not None
    received = all_to_all_single_autograd(tensor.transpose(0, 1).contiguous(), even, even, group)
    by_rank = received.view(world, total // world, batch, heads, head_dim)
    return by_rank.permute(2, 1, 0, 3, 4).reshape(batch, total // world, world * heads, head_dim)
