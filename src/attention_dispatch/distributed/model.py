"""Sharding tensors and whole models over the ranks of a context-parallel group."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..errors import InvalidCallError
from .config import ContextParallel
from .exchange import gather_shards

_CARRIER = "_parallel_config"


def shard(tensor: Tensor, parallel: ContextParallel, dim: int = 1) -> Tensor:
    """This rank's tokens of a tensor that every rank holds whole.

    Its gradient is zero outside this rank's tokens: parameters that were used before sharding receive a part of their
    gradient on each rank, to be summed over ``parallel.group``.

    Args:
        tensor: any shape.
        dim: the token dimension.
    """
    ranges = parallel.layout_for(tensor.shape[dim]).ranges[parallel.rank]
    parts = [tensor.narrow(dim, start, stop - start) for start, stop in ranges] or [tensor.narrow(dim, 0, 0)]
    return torch.cat(parts, dim)


def gather(tensor: Tensor, parallel: ContextParallel, dim: int = 1) -> Tensor:
    """All tokens in global order, on every rank, from every rank's shard; a collective call.

    The gradient of a shard is its part of the gradient that this rank computed for the whole, which is right when
    every rank computes the same loss from the result.
    """
    if parallel.group is None:
        return tensor
    return _Gather.apply(tensor, parallel, dim)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, parallel: ContextParallel, dim: int) -> Tensor:
        lengths = parallel.agreement.all(tensor.shape[dim])
        ctx.layout, ctx.rank, ctx.dim = parallel.layout_of(lengths), parallel.rank, dim
        assert parallel.group is not None
        return gather_shards(tensor, dim, ctx.layout, parallel.group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        parts = [grad.narrow(ctx.dim, start, stop - start) for start, stop in ctx.layout.ranges[ctx.rank]]
        return torch.cat(parts or [grad.narrow(ctx.dim, 0, 0)], ctx.dim), None, None


def context_parallel(
    model: nn.Module | None,
    mesh: DeviceMesh | None = None,
    *,
    ring: int | None = None,
    ulysses: int | None = None,
    inputs: Mapping[str, int] | None = None,
    output: int | None = None,
    **options: Any,
) -> ContextParallel:
    """Split the sequence of a model's attention over the ranks of a mesh.

    The setting is put where models that call ``dispatch_attention_fn(..., parallel_config=self._parallel_config)``
    carry it: on every submodule, or its ``processor``, that has the attribute ``_parallel_config``, as diffusers'
    attention processors do. Everything else in the model has to treat tokens independently of each other.

    Args:
        model: the model, or None to get the setting alone, for ``parallel_config=`` of single calls.
        mesh, ring, ulysses, options: see :class:`~.config.ContextParallel`.
        inputs: names of the model's keyword arguments to shard before its forward, each with its token dimension.
        output: token dimension along which the model's output (a tensor, or the first of a tuple) is gathered.

    Returns:
        The setting.

    Raises:
        InvalidCallError: no part of the model carries the attribute, so its attention would stay local to each rank.

    Example:
        >>> parallel = context_parallel(None, ring=1, ulysses=1)  # doctest: +SKIP
    """
    parallel = ContextParallel(mesh, ring=ring, ulysses=ulysses, **options)
    if model is None:
        return parallel
    carriers = list(_carriers(model))
    if not carriers:
        raise InvalidCallError(
            f"no module of {type(model).__name__} has the attribute {_CARRIER!r}: its attention would see this rank's "
            "tokens only.\n  Do:    pass parallel_config=parallel in the model's calls of dispatch_attention_fn, with "
            "parallel = context_parallel(None, mesh, ...)."
        )
    for carrier in carriers:
        setattr(carrier, _CARRIER, parallel)
    if inputs:
        model.register_forward_pre_hook(_sharder(dict(inputs), parallel), with_kwargs=True)
    if output is not None:
        model.register_forward_hook(_gatherer(output, parallel))
    return parallel


def _carriers(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        for holder in (module, getattr(module, "processor", None)):
            if holder is not None and hasattr(holder, _CARRIER):
                yield holder


def _sharder(inputs: dict[str, int], parallel: ContextParallel) -> Any:
    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        missing = sorted(set(inputs) - set(kwargs))
        if missing:
            raise InvalidCallError(f"context_parallel shards {missing}, which the model was not given by keyword")
        return args, {
            name: shard(value, parallel, inputs[name]) if name in inputs and value is not None else value
            for name, value in kwargs.items()
        }

    return hook


def _gatherer(dim: int, parallel: ContextParallel) -> Any:
    def hook(module: nn.Module, args: tuple, result: Any) -> Any:
        if isinstance(result, Tensor):
            return gather(result, parallel, dim)
        return (gather(result[0], parallel, dim), *result[1:])

    return hook
