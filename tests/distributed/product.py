"""The product of schemes, masks, causality, grouped heads and uneven lengths, run inside a world."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch

from attention_dispatch.distributed import ContextParallel, context_parallel_attention

from .oracle import TorchPair, attention
from .worlds import outcome

HEADS, HEAD_DIM, VALUE_DIM, BATCH = 6, 8, 4, 2
MASKS = ("none", "left", "right", "interior", "bool_rows", "bool_all", "bias_rows", "bias_heads")
SCHEMES = {2: ((2, 1), (1, 2)), 3: ((3, 1), (1, 3)), 4: ((4, 1), (1, 4), (2, 2))}


class Case(NamedTuple):
    """One combination; ``tokens`` are the global numbers of queries and keys."""

    ring: int
    ulysses: int
    mask: str
    causal: bool
    kv_heads: int
    tokens: tuple[int, int]
    layout: str

    @property
    def id(self) -> str:
        return (f"ring{self.ring}-ulysses{self.ulysses}-{self.mask}-{'causal' if self.causal else 'full'}-"
                f"kv{self.kv_heads}-{self.tokens[0]}x{self.tokens[1]}-{self.layout}")


def cases(world: int) -> list[Case]:
    """All cases of a world. Square uneven lengths take both layouts; cross-attention is contiguous.

    Of the pure schemes over four ranks only every third, to save time; three ranks had them all.
    """
    shapes = [((24, 24), "contiguous"), ((13, 13), "contiguous"), ((13, 13), "head_tail"), ((13, 22), "contiguous")]
    found = []
    for ring, ulysses in SCHEMES[world]:
        some = [Case(ring, ulysses, mask, causal, kv_heads, tokens, layout) for mask, causal, kv_heads, (tokens, layout)
                in itertools.product(MASKS, (False, True), (6, 2), shapes)]
        found += some[::3] if max(ring, ulysses) == 4 else some
    return found


def make_mask(kind: str, tokens: tuple[int, int], generator: torch.Generator) -> torch.Tensor | None:
    """The mask of the whole attention, 4-D. One row of the bool masks sees nothing."""
    rows, columns = tokens
    keep = torch.ones(BATCH, 1, 1, columns, dtype=torch.bool)
    if kind == "none":
        return None
    if kind == "left":
        keep[0, ..., :columns // 3] = False
        return keep
    if kind == "right":
        keep[1, ..., -columns // 3:] = False
        return keep
    if kind == "interior":
        keep[0, ..., 3:columns // 2] = False
        keep[1, ..., 5:7] = False
        return keep
    if kind.startswith("bool"):
        dense = torch.rand(BATCH, HEADS if kind == "bool_all" else 1, rows, columns, generator=generator) > 0.4
        dense[:, :, 1] = False
        return dense
    return torch.randn(1, HEADS if kind == "bias_heads" else 1, rows, columns, generator=generator)


def my_mask(kind: str, mask: torch.Tensor | None, parallel: ContextParallel, tokens: tuple[int, int]):
    """The part of the mask that a rank passes: local padding, local rows, or everything."""
    if mask is None:
        return None
    if kind in ("left", "right", "interior"):
        padding = mask[:, 0, 0]
        return take(padding, 1, parallel.layout_for(tokens[1]).ranges[parallel.rank])
    if kind in ("bool_rows", "bias_rows"):
        return take(mask, 2, parallel.layout_for(tokens[0]).ranges[parallel.rank])
    return mask


def take(tensor: torch.Tensor, dim: int, ranges) -> torch.Tensor:
    """The given ranges of one dimension."""
    return torch.cat([tensor.narrow(dim, start, stop - start) for start, stop in ranges]
                     or [tensor.narrow(dim, 0, 0)], dim)


def run_case(case: Case, parallel: ContextParallel, device: str = "cpu") -> dict[str, float]:
    """Relative errors of out, lse, dq, dk, dv of this rank's shard against float64 on one process."""
    generator = torch.Generator().manual_seed(sum(map(ord, case.id)))
    rows, columns = case.tokens

    def random(tokens: int, heads: int, dim: int) -> torch.Tensor:
        return torch.randn(BATCH, tokens, heads, dim, generator=generator)

    whole = [random(rows, HEADS, HEAD_DIM), random(columns, case.kv_heads, HEAD_DIM),
             random(columns, case.kv_heads, VALUE_DIM)]
    grad = random(rows, HEADS, VALUE_DIM)
    mask = make_mask(case.mask, case.tokens, generator)
    exact = [tensor.double().requires_grad_() for tensor in whole]
    out, lse = attention(*exact, mask, is_causal=case.causal)
    gradients = torch.autograd.grad(out, exact, grad.double())

    mine = {length: parallel.layout_for(length).ranges[parallel.rank] for length in case.tokens}
    local = [take(tensor, 1, mine[tensor.shape[1]] if tensor is not whole[0] else mine[rows]).to(device)
             .requires_grad_() for tensor in whole]
    local_mask = my_mask(case.mask, mask, parallel, case.tokens)
    pair = TorchPair(causal="equal", window=False)
    found, found_lse = context_parallel_attention(
        *local, None if local_mask is None else local_mask.to(device), parallel=parallel, pair=pair,
        is_causal=case.causal, return_lse=True)
    found.backward(take(grad, 1, mine[rows]).to(device))
    wanted = [take(out.detach(), 1, mine[rows]), take(lse.detach(), 2, mine[rows]),
              *(take(gradient, 1, mine[gradient.shape[1]]) for gradient in gradients)]
    results = [found.detach(), found_lse, *(tensor.grad for tensor in local)]
    return {name: relative_error(result, want) for name, result, want in
            zip(("out", "lse", "dq", "dk", "dv"), results, wanted)}


def relative_error(result: torch.Tensor, wanted: torch.Tensor) -> float:
    """Norm of the difference over the norm of the wanted; rows of -inf have to coincide."""
    result = result.double().cpu()
    assert result.shape == wanted.shape, (result.shape, wanted.shape)
    assert torch.equal(torch.isinf(result), torch.isinf(wanted))
    assert not result.isnan().any()
    result, wanted = (tensor.masked_fill(torch.isinf(tensor), 0.0) for tensor in (result, wanted))
    return float((result - wanted).norm() / wanted.norm().clamp_min(1e-12))


def run_product(rank: int, world: int, device: str = "cpu") -> dict[str, Any]:
    """Outcome of every case by its id."""
    made: dict[tuple[int, int, str], ContextParallel] = {}
    results = {}
    for case in cases(world):
        key = (case.ring, case.ulysses, case.layout)
        if key not in made:
            made[key] = ContextParallel(None, ring=case.ring, ulysses=case.ulysses, layout=case.layout,
                                        head_chunks=2 if case.layout == "head_tail" else None)
        results[case.id] = outcome(lambda case=case, key=key: run_case(case, made[key], device))
    return results
