"""External backends over fakes of their packages, in worlds of processes: what they compute, and what they refuse."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import torch

from attention_dispatch import dispatch_attention_fn, register_backend
from attention_dispatch.backends import source
from attention_dispatch.distributed import ContextParallel, shard

from .oracle import attention
from .product import relative_error
from .worlds import outcome

sys.path.append(str(Path(__file__).parents[1]))

from fakes import installed

# Name -> (file of the backend, recorded package, whether gradients are asked of it).
ROWS = {
    "flash": ("flash", "flash_attn-2.8.3", True),
    "flash_varlen": ("flash", "flash_attn-2.8.3", True),
    "_flash_3": ("flash", "flash_attn_3-optional", True),
    "flash_4": ("flash", "flash_attn_4-4.0.0b36", True),
    "sage": ("sage", "sageattention-2.2.0", False),
    "_sage_qk_int8_pv_fp16_cuda": ("sage", "sageattention-2.2.0", False),
    "xformers": ("xformers", "xformers-0.0.35", False),  # its function with the LSE has no gradient
}
WITHOUT_LSE = {"_flash_3": "flash_attn_3-tensor"}


def _on_cpu(name: str) -> None:
    backend = import_module(f"attention_dispatch.backends.{ROWS[name][0]}").BACKENDS[name]
    rows = [replace(row, devices=(*row.devices, "cpu"), architectures=(), min_sm=0) for row in backend.capabilities]
    register_backend(replace(backend, capabilities=tuple(rows)), replace=True)


def _computed(name: str, parallel: ContextParallel, is_causal: bool, padded: bool) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 26, heads, 64) for heads in (4, 2, 2)]
    whole = [torch.randn(shape, generator=generator).to(torch.bfloat16) for shape in shapes]
    mask = None
    if padded:
        mask = torch.ones(2, 26, dtype=torch.bool)
        mask[0, 20:] = False
        mask[1, 3:9] = False
    training = ROWS[name][2]
    exact = [tensor.double().requires_grad_(training) for tensor in whole]
    out, _ = attention(*exact, None if mask is None else mask[:, None, None], is_causal=is_causal)
    leaves = [tensor.clone().requires_grad_(training) for tensor in whole]
    local = [shard(leaf, parallel) for leaf in leaves]
    mine = dispatch_attention_fn(
        *local, mask, is_causal=is_causal, enable_gqa=True, backend=name, parallel_config=parallel
    )
    found = {"out": relative_error(mine.detach(), shard(out.detach(), parallel))}
    if training:
        wanted = torch.autograd.grad(out.sum(), exact)
        gradients = torch.autograd.grad(mine.sum(), leaves)
        for which, gradient, want in zip("qkv", gradients, wanted):
            found[f"d{which}"] = relative_error(shard(gradient, parallel), shard(want, parallel))
    return found


def _cases(name: str) -> dict[str, Callable[[], dict[str, float]]]:
    cases = {}
    for scheme, parallel in (("ring", ContextParallel(ring=2)), ("ulysses", ContextParallel(ulysses=2))):
        padded = name in ("flash_varlen", "xformers")
        cases[f"{scheme} plain"] = lambda parallel=parallel, padded=padded: _computed(name, parallel, False, padded)
        if name != "flash_varlen":
            cases[f"{scheme} causal"] = lambda parallel=parallel: _computed(name, parallel, True, False)
    return cases


def two_ranks(rank: int) -> dict[str, dict]:
    """Errors of every row and case; and what a ring over a build without LSE raises."""
    source.platform_reasons = lambda capabilities: ()
    found = {}
    for name, (_file, record, _training) in ROWS.items():
        source.forget()
        with installed(record):
            _on_cpu(name)
            found[name] = {case: outcome(run) for case, run in _cases(name).items()}
    for name, record in WITHOUT_LSE.items():
        source.forget()
        with installed(record):
            _on_cpu(name)
            found[f"{name} without LSE"] = {
                "ring": outcome(lambda name=name: _computed(name, ContextParallel(ring=2), False, False)),
                "ulysses": outcome(lambda name=name: _computed(name, ContextParallel(ulysses=2), False, False)),
            }
    return found
