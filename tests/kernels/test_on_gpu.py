"""What the interpreter cannot show: streams, graphs, compilation, repeatability, addresses beyond 32 bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from .exact import Case, exact_attention, relative_error

pytestmark = pytest.mark.gpu



def case(head_dim: int) -> Case:
    return Case("", 2, 333, 401, 4, 2, head_dim, head_dim)


def flash(query: Tensor, key: Tensor, value: Tensor, **arguments: Any) -> Tensor:
    from attention_dispatch.kernels import flash_attention

    return flash_attention(query, key, value, scale=0.125, **arguments)[0]


def sage(query: Tensor, key: Tensor, value: Tensor, **arguments: Any) -> Tensor:
    from attention_dispatch.kernels import sage_attention

    return sage_attention(query, key, value, scale=0.125, **arguments)[0]


def sage_fp16(query: Tensor, key: Tensor, value: Tensor, **arguments: Any) -> Tensor:
    return sage(query, key, value, pv="fp16", **arguments)


# On sm_90, flash at 128 and sage run as Gluon kernels, the others as plain Triton.
KERNELS = pytest.mark.parametrize(
    ("kernel", "head_dim", "tolerance"),
    [(flash, 64, 5e-3), (flash, 128, 5e-3), (sage, 64, 6e-2), (sage, 128, 6e-2), (sage_fp16, 64, 2.5e-2)],
    ids=lambda x: getattr(x, "__name__", None),
)


@KERNELS
def test_results_repeat_bitwise(kernel: Any, head_dim: int, tolerance: float, cuda: str) -> None:
    inputs = Case("", 1, 2048, 2048, 8, 8, head_dim, head_dim).inputs(torch.bfloat16, cuda)
    first = kernel(*inputs)
    for _ in range(5):
        assert torch.equal(kernel(*inputs), first)


def test_gradients_repeat_bitwise(cuda: str) -> None:
    leaves = [x.requires_grad_() for x in case(128).inputs(torch.bfloat16, cuda)]
    runs = [torch.autograd.grad(flash(*leaves, is_causal=True).sum(), leaves) for _ in range(3)]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0]))


@KERNELS
def test_cuda_graph(kernel: Any, head_dim: int, tolerance: float, cuda: str) -> None:
    inputs = case(head_dim).inputs(torch.bfloat16, cuda)
    kernel(*inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kernel(*inputs)
    for x in inputs:
        x.copy_(torch.randn_like(x))
    out.fill_(float("nan"))
    graph.replay()
    assert relative_error(out, exact_attention(*inputs, scale=0.125)[0]) < tolerance


@KERNELS
def test_compile_fullgraph(kernel: Any, head_dim: int, tolerance: float, cuda: str) -> None:
    inputs = case(head_dim).inputs(torch.bfloat16, cuda)
    padding = torch.rand(2, 401, device=cuda) > 0.3
    compiled = torch.compile(kernel, fullgraph=True)
    with torch.no_grad():
        for arguments in ({}, {"key_padding": padding}):
            out = compiled(*inputs, **arguments)
            assert relative_error(out, exact_attention(*inputs, scale=0.125, **arguments)[0]) < tolerance
            assert torch.equal(out, kernel(*inputs, **arguments))


def test_compile_fullgraph_with_gradients(cuda: str) -> None:
    leaves = [x.requires_grad_() for x in case(64).inputs(torch.bfloat16, cuda)]
    compiled = torch.compile(flash, fullgraph=True)
    got = torch.autograd.grad(compiled(*leaves, is_causal=True).square().sum(), leaves)
    want = torch.autograd.grad(flash(*leaves, is_causal=True).square().sum(), leaves)
    for mine, theirs in zip(got, want):
        assert relative_error(mine, theirs) < 1e-2


@KERNELS
def test_inference_mode_and_another_stream(kernel: Any, head_dim: int, tolerance: float, cuda: str) -> None:
    inputs = Case("", 1, 4096, 4096, 8, 8, head_dim, head_dim).inputs(torch.bfloat16, cuda)
    want = kernel(*inputs)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.inference_mode(), torch.cuda.stream(stream):
        # Written on this stream: a kernel launched on another one would read what was there before.
        torch.cuda._sleep(20_000_000)
        moved = [x.clone() for x in inputs]
        out = kernel(*moved)
    stream.synchronize()
    assert torch.equal(out, want)


@KERNELS
def test_offsets_beyond_32_bits(kernel: Any, head_dim: int, tolerance: float, cuda: str) -> None:
    # One batch row per 2^31 elements and more: a view into a larger allocation.
    steps = 2**31 + 1024
    pool = torch.empty(steps + 400 * 2 * head_dim, dtype=torch.bfloat16, device=cuda)
    views = pool.as_strided((2, 400, 2, head_dim), (steps, 2 * head_dim, head_dim, 1))
    views.copy_(torch.randn(2, 400, 2, head_dim, device=cuda))
    out = kernel(views, views, views)
    assert relative_error(out, exact_attention(views, views, views, scale=0.125)[0]) < tolerance
    # And rows so far apart that offsets within one tile pass 2^31.
    wide = pool.as_strided((1, 200, 1, head_dim), (2**31, 2**31 // 200 // 8 * 8, head_dim, 1))
    wide.copy_(torch.randn(1, 200, 1, head_dim, device=cuda))
    out = kernel(wide, wide, wide)
    assert relative_error(out, exact_attention(wide, wide, wide, scale=0.125)[0]) < tolerance


@KERNELS
def test_nothing_of_size_queries_by_keys_is_allocated(kernel: Any, head_dim: int, tolerance: float, cuda: str) -> None:
    inputs = Case("", 1, 8192, 8192, 4, 4, head_dim, head_dim).inputs(torch.bfloat16, cuda)
    one = inputs[0].numel() * 2
    for arguments in ({}, {"key_padding": torch.rand(1, 8192, device=cuda) > 0.1}):
        kernel(*inputs, **arguments)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kernel(*inputs, **arguments)
        used = torch.cuda.max_memory_allocated() - before
        # out; for sage one byte for each element of Q, K and V; and room for scales, means and lists
        assert used <= one + (0 if kernel is flash else 3 * one // 2) + 2**20


@KERNELS
def test_a_second_launch_sees_its_own_alignment_and_lengths(kernel: Any, head_dim: int, tolerance: float, cuda: str) -> None:
    pool = torch.randn(2 * 300 * 2 * head_dim + 8, device=cuda, dtype=torch.bfloat16)
    for start, length in ((0, 256), (1, 256), (0, 250), (8, 256), (0, 1), (1, 1)):
        x = pool[start : start + 2 * length * 2 * head_dim].view(2, length, 2, head_dim)
        for _ in range(2):
            out = kernel(x, x, x)
            assert relative_error(out, exact_attention(x, x, x, scale=0.125)[0]) < tolerance
