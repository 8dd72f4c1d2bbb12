"""Sharding tensors and whole models over the ranks of a context-parallel group."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..errors import InvalidCallError
from ..sites import Site, find_sites
from .config import ContextParallel
from .exchange import gather_shards
from .inside import put_inside, take_out

_CARRIER = "_parallel_config"
_GIVEN = "_attention_dispatch_given"
_MISSING = object()


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
    exclude: str | Sequence[str] = (),
    **options: Any,
) -> ContextParallel:
    """Split the sequence of a model's attention over the ranks of a mesh.

    Every module that computes attention is found: those that call ``dispatch_attention_fn(...,
    parallel_config=self._parallel_config)`` get the setting as that attribute (of the module or its ``processor``, as in
    diffusers); for others that call ``scaled_dot_product_attention`` or ``dispatch_attention_fn`` it counts while their
    forward runs. Everything else in the model has to treat tokens independently of each other.

    Args:
        model: the model, or None to get the setting alone, for ``parallel_config=`` of single calls.
        mesh, ring, ulysses, options: see :class:`~.config.ContextParallel`.
        inputs: names of the model's keyword arguments to shard before its forward, each with its token dimension.
        output: token dimension along which the model's output (a tensor, or the first of a tuple) is gathered.
        exclude: shell-style patterns of names of modules whose attention stays local: cross-attention to keys that
            every rank holds whole gives the same result either way, and is faster local.

    Returns:
        The setting.

    Raises:
        InvalidCallError: some attention of the model cannot be reached, so it would stay local to each rank.

    Example:
        >>> parallel = context_parallel(None, ring=1, ulysses=1)  # doctest: +SKIP
    """
    parallel = ContextParallel(mesh, ring=ring, ulysses=ulysses, **options)
    if model is None:
        return parallel
    give(model, parallel, (exclude,) if isinstance(exclude, str) else tuple(exclude))
    given = vars(model)[_GIVEN]
    if inputs:
        given.append(model.register_forward_pre_hook(_sharder(dict(inputs), parallel), with_kwargs=True).remove)
    if output is not None:
        given.append(model.register_forward_hook(_gatherer(output, parallel)).remove)
    return parallel


def one_process(model: nn.Module) -> None:
    """Undo :func:`context_parallel` on a model: each process attends to its own tokens again."""
    for undo in reversed(vars(model).pop(_GIVEN, [])):
        undo()


def give(model: nn.Module, parallel: ContextParallel, exclude: Sequence[str] = ()) -> None:
    """Put the setting on every module of a model that computes attention; see :func:`context_parallel`."""
    sites = find_sites(model)
    carriers = list(_carriers(model, sites))
    carrying = {id(carrier) for _, carrier in carriers}
    carriers = [carrier for name, carrier in carriers if not _matches(name, exclude)]
    sites = [site for site in sites if not {id(site.module), id(site.holder)} & carrying]
    sites = [site for site in sites if not _matches(site.name, exclude)]
    unreachable = [
        f"{site.name or type(model).__name__}: {site.why or 'nn.MultiheadAttention may compute attention by hand'}"
        for site in sites
        if not site.routable or isinstance(site.module, nn.MultiheadAttention)
    ]
    if unreachable or not (carriers or sites):
        why = "; ".join(unreachable) or "no module of it computes attention that can be reached"
        raise InvalidCallError(
            f"attention of {type(model).__name__} would see this rank's tokens only.\n  Why:   {why}\n"
            "  Do:    call scaled_dot_product_attention or dispatch_attention_fn there, or leave the module out: "
            "context_parallel(..., exclude=name)."
        )
    one_process(model)
    given = vars(model)[_GIVEN] = []
    for carrier in carriers:
        given.append(partial(_restore, carrier, vars(carrier).get(_CARRIER, _MISSING)))
        setattr(carrier, _CARRIER, parallel)
    for site in sites:
        put_inside(site.module, parallel)
        given.append(partial(take_out, site.module))


def _restore(carrier: Any, before: Any) -> None:
    if before is _MISSING:
        delattr(carrier, _CARRIER)
    else:
        setattr(carrier, _CARRIER, before)


def has_carriers(model: nn.Module) -> bool:
    """Whether some module that computes attention takes the setting as an attribute."""
    return any(True for _ in _carriers(model, find_sites(model)))


def _carriers(model: nn.Module, sites: Sequence[Site]) -> Iterator[tuple[str, Any]]:
    """(module name, object with the attribute). A model that keeps it for itself, with attention inside, is none."""
    for name, module in model.named_modules():
        parts = {id(part) for part in module.modules() if part is not module}
        own = () if any(id(site.module) in parts for site in sites) else (module,)
        for holder in (*own, getattr(module, "processor", None)):
            if holder is not None and hasattr(holder, _CARRIER):
                yield name, holder


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


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
