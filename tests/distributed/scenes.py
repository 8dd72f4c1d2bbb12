"""Single scenes that worlds of processes run: refusals, failures, other dispatchers' regressions, compile, models."""

from __future__ import annotations

import json
import shutil
import time
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh

from attention_dispatch import dispatch_attention_fn, explain, reset_attention_backend, set_attention_backend
from attention_dispatch.distributed import (
    ContextParallel,
    as_context_parallel,
    context_parallel,
    context_parallel_attention,
    dispatch_parallel,
    gather,
    one_process,
    shard,
)
from attention_dispatch.request import current, parse

from .oracle import TorchPair, attention
from .product import relative_error
from .worlds import outcome

TORCH_SDPA = F.scaled_dot_product_attention


def tensors(tokens=13, heads=4, kv_heads=4, dim=8, batch=2, columns=None, dtype=torch.float32):
    generator = torch.Generator().manual_seed(tokens * 100 + heads)
    shapes = [(batch, tokens, heads, dim), (batch, columns or tokens, kv_heads, dim),
              (batch, columns or tokens, kv_heads, dim)]
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def dispatched(parallel, whole, mask=None, *, backend="reference", is_causal=False, dropout_p=0.0, **kwargs):
    """Result of this rank through the dispatcher's entry."""
    local = [shard(tensor, parallel) for tensor in whole]
    return dispatch_attention_fn(*local, mask, dropout_p, is_causal, None, True, kwargs, backend=backend,
                                 parallel_config=parallel)


def error_to(parallel, found, whole, mask=None, **options):
    out, _ = attention(*(tensor.double() for tensor in whole), mask, **options)
    return relative_error(found.detach(), shard(out, parallel))


def registered_backends(parallel: ContextParallel) -> dict[str, float]:
    """Forward and gradients of the registered CPU backends, each with what it declares."""
    found = {}
    for backend in ("reference", "_native_flash", "native", "auto", ["_native_cudnn", "reference"]):
        whole = tensors(24, 4, 2)
        exact = [tensor.double().requires_grad_() for tensor in whole]
        out, _ = attention(*exact, is_causal=True)
        wanted = torch.autograd.grad(out.square().sum(), exact)
        leaves = [tensor.clone().requires_grad_() for tensor in whole]
        mine = dispatched(parallel, leaves, backend=backend, is_causal=True)
        gradients = torch.autograd.grad(mine.square().sum(), leaves)
        found[f"{backend}"] = relative_error(mine.detach(), shard(out.detach(), parallel))
        for name, gradient, want in zip("qkv", gradients, wanted):
            found[f"{backend} d{name}"] = relative_error(shard(gradient, parallel), shard(want, parallel))
    return found


def windows(parallel: ContextParallel, native: bool) -> dict[str, float]:
    """Windows, causal and not, with and without a kernel that knows windows; softcap beside it."""
    found = {}
    for tokens, columns in ((24, 24), (13, 13), (13, 22)):
        for window in ((3, -1), (3, 2), (1, 0), (-1, 4), (20, 1)):
            for causal in (False, True):
                whole = tensors(tokens, columns=columns)
                exact = [tensor.double().requires_grad_() for tensor in whole]
                out, _ = attention(*exact, window=window, is_causal=causal, softcap=3.0)
                wanted = torch.autograd.grad(out.square().sum(), exact)
                leaves = [tensor.clone().requires_grad_() for tensor in whole]
                mine = context_parallel_attention(
                    *(shard(leaf, parallel) for leaf in leaves), parallel=parallel, window_size=window,
                    is_causal=causal, softcap=3.0, pair=TorchPair(causal="equal", window=native))
                gradients = torch.autograd.grad(mine.square().sum(), leaves)
                name = f"{tokens}x{columns} {window} {causal}"
                found[name] = max(relative_error(mine.detach(), shard(out.detach(), parallel)), *(
                    relative_error(shard(g, parallel), shard(want, parallel)) for g, want in zip(gradients, wanted)))
    return found


def refusals(rank: int) -> dict[str, str]:
    """First line of what each bad call raises on this rank."""
    ring, ulysses = ContextParallel(ring=2), ContextParallel(ulysses=2)
    plain = TorchPair("plain", masks=(), causal="equal", window=False, gradients=False)
    q, k, v = (shard(tensor, ring) for tensor in tensors())
    row_mask = torch.ones(1, 1, q.shape[1], k.shape[1], dtype=torch.bool)

    def call(parallel=ring, pair=plain, mask=None, tensors=(q, k, v), **options):
        return context_parallel_attention(*tensors, mask, parallel=parallel, pair=pair, **options)

    leaf = q.clone().requires_grad_()
    cases = {
        "dropout": lambda: call(dropout_p=0.1),
        "mask kind": lambda: call(mask=torch.ones(1, 1, q.shape[1], 13, dtype=torch.bool)),
        "padding": lambda: call(ulysses, mask=torch.ones(2, k.shape[1], dtype=torch.bool)),
        "gradients": lambda: call(tensors=(leaf, k, v)),
        "local rows and keys": lambda: call(pair=TorchPair(), mask=row_mask),
        "causal differs": lambda: call(is_causal=rank == 0),
        "one rank's shapes": lambda: call(tensors=(q, k[..., :4] if rank else k, v)),
        "quantised name": lambda: dispatch_parallel(q, k, v, None, 0.0, False, None, False, {}, parse("sage"), ring),
        "no lse": lambda: dispatch_parallel(q, k, v, None, 0.0, False, None, False, {}, parse("_native_math"), ring),
        "option": lambda: dispatch_parallel(q, k, v, None, 0.0, False, None, False, {"smooth_k": True},
                                            parse("reference"), ring),
        "degrees": lambda: ContextParallel(ring=3),
        "not set up": lambda: as_context_parallel(SimpleNamespace(ring_degree=2, ulysses_degree=1)),
        "no attention": lambda: context_parallel(torch.nn.Linear(2, 2), ring=2),
        "hidden attention": lambda: context_parallel(torch.nn.TransformerEncoderLayer(8, 2), ring=2),
        "block mask": lambda: call(mask=object()),
    }
    found = {name: outcome(case).split("\n\n")[0] for name, case in cases.items()}
    found["sent"] = str(len(plain.calls))
    # After all refusals the ranks are still in step.
    found["after"] = outcome(lambda: f"{error_to(ring, call(), tensors()):.1e}")
    return found


class FailingPair(TorchPair):
    """Fails in one call on one rank."""

    def __init__(self, fails: bool, where: str):
        super().__init__()
        self._fails, self._where = fails, where

    def forward(self, *args):
        if self._fails and self._where == "forward":
            raise MemoryError("no room for the scores")
        return super().forward(*args)

    def backward(self, *args):
        if self._fails and self._where == "backward":
            raise MemoryError("no room for the gradients")
        return super().backward(*args)


def failures(rank: int, world: int) -> dict[str, Any]:
    """A kernel that fails on the last rank: what every rank raises, and after how many seconds."""
    found: dict[str, Any] = {}
    for scheme in ({"ring": world}, {"ulysses": world}):
        parallel = ContextParallel(**scheme)
        for where in ("forward", "backward"):
            pair = FailingPair(rank == world - 1, where)
            leaves = [shard(tensor, parallel).requires_grad_() for tensor in tensors()]
            start = time.monotonic()

            def attempt(pair=pair, leaves=leaves, parallel=parallel):
                out = context_parallel_attention(*leaves, parallel=parallel, pair=pair)
                out.sum().backward()

            text = outcome(attempt)
            found[f"{scheme} {where}"] = (text, time.monotonic() - start)
    return found


def absent_rank(rank: int) -> str:
    """Rank 1 makes no call: rank 0's agreement gives up after its timeout."""
    parallel = ContextParallel(ring=2, timeout=timedelta(seconds=2))
    q, k, v = (shard(tensor, parallel) for tensor in tensors())
    if rank:
        time.sleep(4)
        return ""
    start = time.monotonic()
    text = outcome(lambda: context_parallel_attention(q, k, v, parallel=parallel, pair=TorchPair()))
    return f"{time.monotonic() - start:.1f} {text}"


def resident_keys(rank: int, world: int) -> dict[str, int]:
    """Most key tokens that one kernel call of a ring sees, and the messages' peers."""
    parallel = ContextParallel(ring=world)
    pair = TorchPair()
    context_parallel_attention(*(shard(tensor, parallel) for tensor in tensors(24)), parallel=parallel, pair=pair)
    causal = TorchPair(masks=(), causal="equal", window=False)
    balanced = ContextParallel(ring=world, layout="head_tail")
    context_parallel_attention(*(shard(t, balanced) for t in tensors(24)), parallel=balanced, pair=causal,
                               is_causal=True)
    work = sum(q * k // (2 if call.is_causal else 1) for (q, k), call in causal.calls)
    return {"keys": max(keys for (_, keys), _ in pair.calls), "calls": len(pair.calls), "causal calls":
            len(causal.calls), "work": work}


class Attention(torch.nn.Module):
    """Self-attention; ``style`` says how it calls, and whether it carries the setting as diffusers' processors do."""

    def __init__(self, style="carrier"):
        super().__init__()
        torch.manual_seed(0)
        self.project = torch.nn.Linear(16, 48)
        self.style = style
        if style == "carrier":
            self._parallel_config = None

    def forward(self, hidden):
        q, k, v = self.project(hidden).unflatten(-1, (3, 4, 4)).unbind(2)
        if self.style == "sdpa":
            q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        parallel = getattr(self, "_parallel_config", None)
        return dispatch_attention_fn(q, k, v, is_causal=True, parallel_config=parallel).flatten(2)


class Block(torch.nn.Module):
    """A model around it, which keeps a setting for itself, as diffusers' models do."""

    _parallel_config = None

    def __init__(self, style):
        super().__init__()
        self.attention = Attention(style)

    def forward(self, hidden):
        return hidden + self.attention(hidden)


def whole_model(world: int, style: str, backend: str | None = None) -> dict[str, float]:
    """Output and parameter gradients of a sharded model against the same model alone, before and after."""
    hidden = torch.randn(2, 13, 16, generator=torch.Generator().manual_seed(1))
    alone, model = Block(style), Block(style)
    # Calls of the same shapes outside must not share their short way with those inside.
    local = hidden[:, :7] if dist.get_rank() == 0 else hidden[:, 7:]
    before = alone(local)
    wanted = alone(hidden)
    wanted.square().sum().backward()
    parallel = context_parallel(model, ring=world, inputs={"hidden": 1}, output=1)
    if backend is not None:
        set_attention_backend(model, backend)
    found = model(hidden=hidden)
    found.square().sum().backward()
    gradient = model.attention.project.weight.grad
    dist.all_reduce(gradient)
    assert parallel.world == world
    assert current.state.fields.get("parallel") is None
    again = context_parallel(model, ring=world, inputs={"hidden": 1}, output=1)
    twice = relative_error(model(hidden=hidden).detach(), wanted.detach().double())
    assert again is not parallel
    one_process(model)
    if backend is not None:
        reset_attention_backend(model)
    assert not model._forward_pre_hooks and not model._forward_hooks and not model.attention._forward_hooks
    assert getattr(model.attention, "_parallel_config", None) is None
    assert F.scaled_dot_product_attention is TORCH_SDPA
    return {"out": relative_error(found.detach(), wanted.detach().double()), "set twice": twice,
            "undone": relative_error(model(hidden).detach(), wanted.detach().double()),
            "grad": relative_error(gradient, alone.attention.project.weight.grad.double()),
            "outside": relative_error(alone(local).detach(), before.detach().double())}


def foreign_config(rank: int, world: int) -> dict[str, Any]:
    """A ContextParallelConfig as diffusers builds it, on a 2-D mesh, set up and used."""
    mesh = init_device_mesh("cpu", (1, world), mesh_dim_names=("ring", "ulysses"))
    inner = SimpleNamespace(ring_degree=1, ulysses_degree=world, convert_to_fp32=True, ulysses_anything=True,
                            ring_anything=False, _mesh=mesh, _ring_mesh=mesh["ring"], _ulysses_mesh=mesh["ulysses"],
                            _ring_local_rank=0)
    inner = _Config(**vars(inner))
    config = _Config(context_parallel_config=inner, tensor_parallel_config=None)
    parallel = as_context_parallel(config)
    assert parallel is as_context_parallel(config)
    whole = tensors()
    local = [shard(tensor, parallel) for tensor in whole]
    out = dispatch_parallel(*local, None, 0.0, True, None, False, {}, parse("reference"), config)
    return {"out": error_to(parallel, out, whole, is_causal=True),
            "none": as_context_parallel(_Config(context_parallel_config=None))}


class _Config:
    def __init__(self, **fields):
        vars(self).update(fields)


def compiled_ulysses(world: int, compiler: str) -> dict[str, Any]:
    """Ulysses under torch.compile without graph breaks, forward and gradients."""
    parallel = ContextParallel(ulysses=world)
    whole = tensors(24, 4, 4)

    def layer(q, k, v):
        return dispatch_attention_fn(q, k, v, is_causal=True, backend="native", parallel_config=parallel) * 2

    leaves = [shard(tensor, parallel).requires_grad_() for tensor in whole]
    torch._dynamo.reset()
    out = torch.compile(layer, fullgraph=True, backend=compiler)(*leaves)
    exact = [tensor.double().requires_grad_() for tensor in whole]
    want, _ = attention(*exact, is_causal=True)
    wanted = torch.autograd.grad((want * 2).square().sum(), exact)
    gradients = torch.autograd.grad(out.square().sum(), leaves)
    return {"out": relative_error(out.detach(), shard(want.detach() * 2, parallel)),
            "grad": max(relative_error(g, shard(w, parallel)) for g, w in zip(gradients, wanted))}


def compiled_model(world: int) -> dict[str, float]:
    """Modules that got the setting in each way, compiled without graph breaks; an exact multiple of ranks of tokens."""
    hidden = torch.randn(2, 14, 16, generator=torch.Generator().manual_seed(1))
    found = {}
    for style in ("carrier", "plain", "sdpa"):
        torch._dynamo.reset()
        alone, model = Attention(style), Attention(style)
        parallel = context_parallel(model, ulysses=world)
        compiled = torch.compile(model, fullgraph=True, backend="eager")(shard(hidden, parallel))
        found[style] = relative_error(compiled.detach(), shard(alone(hidden).detach().double(), parallel))
    return found


def refused_in_graph(ring: ContextParallel) -> str:
    """What a ring raises while it is traced."""
    local = [shard(tensor, ring) for tensor in tensors(24)]
    return outcome(lambda: torch.compile(
        lambda q, k, v: dispatch_attention_fn(q, k, v, parallel_config=ring), fullgraph=True, backend="eager")(*local))


def sent_by(call) -> int:
    """Bytes that a call hands to torch.distributed for other ranks."""
    sent, original = [], dist.batch_isend_irecv

    def count(ops):
        sent.extend(op.tensor.numel() * op.tensor.element_size() for op in ops if op.op is dist.isend)
        return original(ops)

    dist.batch_isend_irecv = count
    try:
        call()
    finally:
        dist.batch_isend_irecv = original
    return sum(sent)


def explained(ring: ContextParallel, ulysses: ContextParallel) -> dict[str, Any]:
    """What explain says of calls, and what they then do."""
    found: dict[str, Any] = {}
    for name, parallel, backend, mask in (
        ("ring", ring, "native", None), ("ulysses", ulysses, "native", None), ("math", ring, "_native_math", None),
        ("sage", ring, ["sage", "reference"], None), ("nothing", ring, "sage", None),
        ("padded", ulysses, "auto", torch.ones(2, 13, dtype=torch.bool)),
    ):
        local = [shard(tensor, parallel) for tensor in tensors(13, 3, 3)]
        decision = explain(*local, mask, is_causal=name == "ring", backend=backend, parallel_config=parallel)
        result = None
        if decision.backend is not None:
            result = sent_by(lambda local=local, name=name, backend=backend, parallel=parallel, mask=mask:
                             dispatch_attention_fn(*local, mask, is_causal=name == "ring", backend=backend,
                                                   parallel_config=parallel))
        found[name] = (str(decision), json.loads(decision.to_json()), result)
    return found


def two_ranks(rank: int) -> dict[str, Any]:
    """Scenes of a world of two."""
    ring, ulysses = ContextParallel(ring=2), ContextParallel(ulysses=2)
    first = ContextParallel(ring=2, agreement="first", head_chunks=2)
    whole = tensors(13, 4, 2)
    scenes = {
        "ring backends": lambda: registered_backends(ring),
        "ulysses backends": lambda: registered_backends(ulysses),
        "ulysses native": lambda: {"out": error_to(ulysses, dispatched(ulysses, whole, backend="native"), whole)},
        "ring windows": lambda: windows(ring, True),
        "ring windows as masks": lambda: windows(ring, False),
        "ulysses windows": lambda: windows(ulysses, True),
        "agreed once": lambda: {str(i): error_to(first, dispatched(first, whole), whole) for i in range(3)},
        "model": lambda: whole_model(2, "carrier"),
        "model without the attribute": lambda: whole_model(2, "plain"),
        "model of torch": lambda: whole_model(2, "sdpa"),
        "routed model of torch": lambda: whole_model(2, "sdpa", "reference"),
        "foreign": lambda: foreign_config(rank, 2),
        "explained": lambda: explained(ring, ulysses),
        "compiled": lambda: compiled_ulysses(2, "aot_eager"),
        **({"compiled by Inductor": lambda: compiled_ulysses(2, "inductor")} if shutil.which("g++") else {}),
        "compiled models": lambda: compiled_model(2),
        "compiled ring": lambda: refused_in_graph(ring),
        "resident": lambda: resident_keys(rank, 2),
        "failures": lambda: failures(rank, 2),
        "refusals": lambda: refusals(rank),
        "absent": lambda: absent_rank(rank),
        "few tokens": lambda: {"out": error_to(ring, dispatched(ring, tensors(1)), tensors(1))},
    }
    return {name: outcome(scene) for name, scene in scenes.items()}


def three_ranks(rank: int) -> dict[str, Any]:
    """Scenes of a world of three."""
    ring, ulysses = ContextParallel(ring=3), ContextParallel(ulysses=3)
    balanced = ContextParallel(ring=3, layout="head_tail")
    few, mqa = tensors(13, 4, 2), tensors(13, 2, 1)

    def gathered():
        whole = tensors(13)[0]
        return {"out": relative_error(gather(shard(whole, balanced), balanced), whole.double())}

    scenes = {
        "ring windows": lambda: windows(balanced, True),
        "uneven heads": lambda: {"out": error_to(ulysses, dispatched(ulysses, few), few)},
        "fewer heads than ranks": lambda: {"out": error_to(ulysses, dispatched(ulysses, mqa), mqa)},
        "fewer tokens than ranks": lambda: {"out": error_to(ring, dispatched(ring, tensors(2)), tensors(2))},
        "gather": gathered,
        "resident": lambda: resident_keys(rank, 3),
        "failures": lambda: failures(rank, 3),
    }
    return {name: outcome(scene) for name, scene in scenes.items()}
