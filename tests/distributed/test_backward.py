"""Backends' gradients of one block of keys, given the output and LSE of all keys, against float64."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from attention_dispatch import registry
from attention_dispatch.call import AttentionCall
from attention_dispatch.masks import Mask
from attention_dispatch.resolve import verdict_on

from .oracle import attention
from .product import relative_error

# In units of the dtype's machine epsilon: what exact kernels of half precision reach with the probabilities rounded.
ERROR = 6.0


class Case(NamedTuple):
    """Sizes of one block and what is hidden in it; ``first`` keys belong to another block."""

    rows: int = 96
    first: int = 70
    keys: int = 96
    heads: int = 4
    kv_heads: int = 4
    head_dim: int = 64
    value_dim: int = 64
    is_causal: bool = False
    mask: str = "none"
    window: tuple[int, int] = (-1, -1)


CASES = {
    "plain": Case(),
    "causal": Case(is_causal=True),
    "fewer queries": Case(rows=40, is_causal=True),
    "grouped heads": Case(kv_heads=2),
    "one head": Case(kv_heads=1, is_causal=True),
    "head dim 36": Case(head_dim=36, value_dim=36),
    "wide values": Case(value_dim=96),
    "64 of 128": Case(rows=192, keys=192),
    "one query and key": Case(rows=1, keys=1),
    "left padding": Case(mask="key_padding"),
    "rows": Case(mask="bool"),
    "bias": Case(mask="bias", kv_heads=2),
    "causal rows": Case(mask="bool", is_causal=True),
    "window": Case(window=(20, 5)),
}


def block_mask(case: Case, generator: torch.Generator) -> tuple[Mask | None, torch.Tensor | None]:
    """The block's mask, and its 4-D form."""
    if case.mask == "key_padding":
        keep = torch.ones(2, case.keys, dtype=torch.bool)
        keep[0, :30] = False
        return Mask("key_padding", keep), keep[:, None, None]
    if case.mask == "bool":
        keep = torch.rand(2, 1, case.rows, case.keys, generator=generator) > 0.3
        keep[:, :, 3] = False
        return Mask("bool", keep), keep
    if case.mask == "bias":
        bias = torch.randn(1, case.heads, case.rows, case.keys, generator=generator)
        return Mask("bias", bias), bias
    return None, None


def gradients(backend: str, case: Case, dtype: torch.dtype, device: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """``(found, wanted)``: dq, dk, dv of the block. Row 5 sees no key at all, neither here nor elsewhere."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, case.rows, case.heads, case.head_dim), (2, case.first + case.keys, case.kv_heads, case.head_dim),
              (2, case.first + case.keys, case.kv_heads, case.value_dim)]
    q, k, v = (torch.randn(shape, generator=generator).to(dtype).double() for shape in shapes)
    grad = torch.randn(2, case.rows, case.heads, case.value_dim, generator=generator).to(dtype).double()
    mask, dense = block_mask(case, generator)
    if dense is not None and dense.dtype != torch.bool:
        dense = dense.to(dtype).double()
    block = slice(case.first, None)
    hidden_here, lse_here = attention(q, k[:, block], v[:, block], dense, is_causal=case.is_causal, window=case.window)
    elsewhere = torch.ones(1, 1, case.rows, case.first, dtype=torch.bool)
    if case.mask == "bool":
        elsewhere[:, :, 3] = False
    rest, lse_rest = attention(q, k[:, :case.first], v[:, :case.first], elsewhere)
    lse = torch.logaddexp(lse_here, lse_rest)
    base = lse.masked_fill(lse == -torch.inf, 0.0)
    weights = [torch.exp(part - base).transpose(1, 2)[..., None] for part in (lse_here, lse_rest)]
    out = hidden_here * weights[0] + rest * weights[1]

    leaves = [tensor.clone().requires_grad_() for tensor in (q, k[:, block], v[:, block])]
    part, part_lse = attention(*leaves, dense, is_causal=case.is_causal, window=case.window)
    # The block's share: its own output and LSE, weighted and normalised by the whole row's.
    weight = torch.exp(part_lse - base).masked_fill(part_lse == -torch.inf, 0.0).transpose(1, 2)[..., None]
    share = (part * weight * grad).sum() - (weight * (out * grad).sum(-1, keepdim=True).detach()).sum()
    wanted = list(torch.autograd.grad(share, leaves))

    local = [tensor.to(device, dtype) for tensor in (q, k[:, block], v[:, block])]
    if mask is not None:
        tensor = mask.tensor.to(device) if mask.tensor.dtype == torch.bool else mask.tensor.to(device, dtype)
        mask = Mask(mask.kind, tensor)
    call = AttentionCall(*local, mask, 0.0, case.is_causal, case.head_dim ** -0.5, case.heads != case.kv_heads,
                         case.window)
    rows = lse.masked_fill(lse == -torch.inf, torch.inf)
    found = registry.require(backend).backward(grad.to(device, dtype), call, out.to(device, dtype),
                                               rows.to(device, torch.float64 if dtype == torch.float64 else torch.float32))
    return list(found), wanted


def check(backend: str, case: Case, dtype: torch.dtype, device: str, limit: float) -> None:
    found, wanted = gradients(backend, case, dtype, device)
    for name, one, want in zip(("dq", "dk", "dv"), found, wanted):
        error = relative_error(one, want)
        assert error < limit, f"{name}: {error:.1e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.head_dim == case.value_dim])
def test_flash_on_cpu(name, dtype):
    check("_native_flash", CASES[name], dtype, "cpu", 1e-5 if dtype != torch.bfloat16 else ERROR * 2 ** -8)


def served(backend: str, case: Case) -> tuple:
    """Reasons of the declared capabilities against training with such a block."""
    from attention_dispatch.distributed.connect import _spec
    from attention_dispatch.distributed.pair import BlockFacts

    lengths = "equal" if case.rows == case.keys else "fewer_queries"
    shapes = [(2, case.rows, case.heads, case.head_dim), (2, case.keys, case.kv_heads, case.head_dim),
              (2, case.keys, case.kv_heads, case.value_dim)]
    tensors = [torch.empty(shape, dtype=torch.bfloat16, device="cuda") for shape in shapes]
    facts = BlockFacts(case.mask, case.is_causal, case.window != (-1, -1), lengths, False, False, True, True)
    return verdict_on(backend, _spec(*tensors, facts)).reasons


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("backend", ["_native_flash", "_native_efficient", "_native_cudnn", "triton_flash"])
@pytest.mark.parametrize("name", CASES)
def test_on_cuda(name, backend):
    reasons = served(backend, CASES[name])
    if reasons:
        pytest.skip(f"refused by declaration: {reasons[0]}")
    check(backend, CASES[name], torch.bfloat16, "cuda", ERROR * 2 ** -8)
