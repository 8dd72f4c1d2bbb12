"""Tuning, checks and measurements on a CUDA GPU."""

from __future__ import annotations

import pytest
import torch

import attention_dispatch as ad
from attention_dispatch.call import canonicalise, spec_of
from attention_dispatch.tuning import exactness, health, shapes, store
from attention_dispatch.tuning.bench import bench
from attention_dispatch.tuning.candidates import candidates, gradients

from .fakes import backend

pytestmark = pytest.mark.gpu


@pytest.fixture
def tensors(cuda):
    return [torch.randn(2, 512, 4, 64, dtype=torch.bfloat16, device=cuda) for _ in range(3)]


def test_tuning_stores_the_choice_that_auto_then_takes(tensors):
    with ad.tuning(budget_s=0.02) as tuned:
        ad.dispatch_attention_fn(*tensors)
    [found] = tuned.measurements
    assert found.static in found.times and not found.rejected, found.rejected
    assert torch.cuda.get_device_name() in store.path("cuda").read_text() and "cuda:sm_" in found.key
    for _ in range(2):
        with ad.record() as calls:
            ad.dispatch_attention_fn(*tensors, backend="auto")
        assert calls.backends() == {found.exact: 1}


def test_graph_replays_are_measured_apart(tensors):
    with ad.tuning(budget_s=0.02, policy="graph", names=["native", "_native_flash"]) as tuned:
        ad.dispatch_attention_fn(*tensors)
    assert "policy=graph" in tuned.measurements[0].key and set(tuned.measurements[0].times) == {"native", "_native_flash"}


@pytest.mark.parametrize("arguments", [{}, {"is_causal": True}], ids=["plain", "causal"])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_gradients_of_every_ready_backend_are_right(arguments, kv_heads, cuda):
    generator = torch.Generator(cuda).manual_seed(0)
    sizes = (4, kv_heads, kv_heads)
    query, key, value = (
        torch.randn(2, 512, heads, 64, dtype=torch.bfloat16, device=cuda, generator=generator) for heads in sizes
    )
    key += 2 * torch.randn(1, 1, kv_heads, 64, dtype=torch.bfloat16, device=cuda, generator=generator)
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    call = canonicalise(*leaves, enable_gqa=kv_heads != 4, **arguments)
    spec, exact = spec_of(call), exactness.sample_gradients(call)
    found = candidates(spec, False)
    assert {"native", "_native_flash"} <= {each.name for each in found}
    for each in found:
        errors = exactness.gradient_errors(gradients(each, call, exact.grad_out), exact)
        assert exactness.gradient_problem(each, spec, errors) is None, (each.name, errors)


def test_auto_can_be_captured_in_a_graph(tensors):
    expected = ad.dispatch_attention_fn(*tensors, backend="auto")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ad.dispatch_attention_fn(*tensors, backend="auto")
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)


def test_a_kernel_that_breaks_the_device_spoils_nothing_for_others(cuda):
    found = health.check(
        ["fake_corrupt", "fake_right"], cuda, timeout_s=60.0, imports=("tests.tuning.registered_fakes",)
    )
    states = {result.backend: result.state for result in found}
    assert states["fake_corrupt"] in ("failed", "crashed") and states["fake_right"] == "ok"
    assert float(torch.ones(2, device=cuda).sum()) == 2.0


def test_bench_reports_memory_and_errors(registered, cuda):
    registered(backend("fake_nan"))
    shape = shapes.Shape("", 1, 512, 512, 4, 4, 64)
    rows = {
        row.backend: row
        for row in bench(shape, torch.device(cuda), names=["native", "fake_nan"], budget_s=0.01, check_small=False)
    }
    assert rows["native"].state == "ok" and rows["native"].peak_bytes >= 512 * 4 * 64 * 2
    assert rows["native"].relative_l2 < 1e-2 and rows["native"].first_call_s > 0
    assert rows["fake_nan"].state == "wrong" and rows["fake_nan"].speedup is None


def test_a_record_compares_on_the_gpu(tensors, registered):
    registered(backend("fake_nan"))
    with ad.record(compare="reference") as calls:
        ad.dispatch_attention_fn(*tensors, backend="native")
        ad.dispatch_attention_fn(*tensors, backend="fake_nan")
    right, wrong = calls.records
    assert right.check.ok and not wrong.check.finite and calls.first_not_finite() is wrong
