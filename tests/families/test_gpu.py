"""The real packages on a GPU: every row that is installed here, against the oracle. Run with ``pytest -m gpu``."""

from __future__ import annotations

import os

import pytest
import torch
from family_rows import BACKENDS

from attention_dispatch import dispatch_attention_fn, registry, self_test
from attention_dispatch.backends.reference import attention
from attention_dispatch.call import canonicalise, spec_of
from attention_dispatch.capabilities import reasons_against, row_for

pytestmark = pytest.mark.gpu

HEADS = 4
CASES = {
    "plain": {},
    "fp16": {"dtype": torch.float16},
    "cross": {"q_len": 130, "k_len": 333},
    "one_query": {"q_len": 1},
    # Below, at and above the sizes of blocks of keys, where a tail that is not hidden shows.
    "full_blocks": {"q_len": 192, "k_len": 192},
    "causal_scale_behind_the_end": {"q_len": 150, "k_len": 150, "is_causal": True},
    "short_keys": {"q_len": 70, "k_len": 7},
    "scale": {"scale": 0.05},
    "gqa_lse": {"kv_heads": 2, "lse": True},
    "mqa": {"kv_heads": 1},
    "lse": {"lse": True},
    "causal_lse": {"is_causal": True, "lse": True},
    "causal_fewer_queries": {"is_causal": True, "q_len": 130, "k_len": 333, "lse": True},
    "causal_more_queries": {"is_causal": True, "q_len": 333, "k_len": 130, "lse": True},
    "window": {"window_size": (50, 20), "lse": True},
    "window_fewer_queries": {"window_size": (50, 20), "q_len": 130, "k_len": 333},
    "causal_window": {"window_size": (50, 0), "is_causal": True},
    "softcap": {"softcap": 3.0},
    "grad": {"grad": True},
    "grad_causal_gqa": {"grad": True, "is_causal": True, "kv_heads": 2},
    "grad_deterministic": {"grad": True, "deterministic": True},
    "grad_padding": {"grad": True, "mask": "padding"},
    "padding": {"mask": "padding"},
    "padding_lse": {"mask": "padding", "lse": True},
    "bool": {"mask": "bool"},
    "bias": {"mask": "bias", "lse": True},
    # A mask of each head's own where heads share keys, a row and a head without any key, and more than one tile.
    "bool_per_head_gqa": {"mask": "bool_per_head", "kv_heads": 2, "lse": True, "q_len": 150, "k_len": 333},
    "bias_inf_gqa": {"mask": "bias_inf", "kv_heads": 2, "lse": True, "q_len": 150, "k_len": 333},
    "bool_dim_128_fp16": {"mask": "bool", "dim": 128, "dtype": torch.float16},
    "bool_softcap": {"mask": "bool", "softcap": 3.0},
    "bias_by_distance": {"mask": "bias_by_distance"},
    "dim_72": {"dim": 72},
    "dim_96": {"dim": 96, "is_causal": True},
    "dim_128": {"dim": 128, "lse": True},
    "dim_128_grad": {"dim": 128, "grad": True},
    "dim_192": {"dim": 192},
    "dim_256": {"dim": 256},
    "dim_v": {"dim": 192, "dim_v": 128},
}


@pytest.fixture(autouse=True)
def gpu(registered):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")


def available(name: str):
    found = registry.status(name)
    if not found.available:
        pytest.skip(str(found))
    return registry.get(name)


def skip_if_refused(backend, spec) -> None:
    """Skip what is declared, of the backend or of the build that is installed, as not served."""
    reasons = (*reasons_against(backend.capabilities, spec), *backend.extra_reasons(spec))
    if reasons:
        pytest.skip("; ".join(map(str, reasons)))


def mask_of(kind: str | None, batch: int, q_len: int, k_len: int) -> torch.Tensor | None:
    generator = torch.Generator().manual_seed(3)
    if kind is None:
        return None
    if kind == "bool":
        return (torch.rand(batch, 1, q_len, k_len, generator=generator) < 0.7).cuda()
    if kind == "bias":
        return torch.randn(1, HEADS, q_len, k_len, generator=generator).cuda()
    if kind in ("bool_per_head", "bias_inf"):
        keep = torch.rand(batch, HEADS, q_len, k_len, generator=generator) < 0.7
        keep[0, 1, 5] = keep[1, 2] = False
        keep[2, :, 7, :300] = False
        return (
            keep
            if kind == "bool_per_head"
            else torch.randn(keep.shape, generator=generator).masked_fill(~keep, float("-inf"))
        ).cuda()
    if kind == "bias_by_distance":
        distances = torch.randn(q_len + k_len - 1, generator=generator).cuda()
        return distances.as_strided((1, 1, q_len, k_len), (1, 1, 1, 1))
    keep = torch.rand(batch, k_len, generator=generator) < 0.6
    keep[0, : k_len // 3] = False
    keep[1] = False
    return keep[:, None, None, :].cuda()


def call_of(
    q_len=200, k_len=None, kv_heads=HEADS, dim=64, dim_v=None, dtype=torch.bfloat16, mask=None, grad=False, **rest
):
    batch, k_len = 3, k_len or max(q_len, 200)
    generator = torch.Generator().manual_seed(1)
    shapes = (batch, q_len, HEADS, dim), (batch, k_len, kv_heads, dim), (batch, k_len, kv_heads, dim_v or dim)
    tensors = [torch.randn(shape, generator=generator).to("cuda", dtype).requires_grad_(grad) for shape in shapes]
    extra = {name: rest.pop(name) for name in ("window_size", "softcap", "deterministic") if name in rest}
    extra["return_lse"] = rest.pop("lse", False)
    return tensors, mask_of(mask, batch, q_len, k_len), {"enable_gqa": True, **rest}, extra


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert actual.shape == expected.shape and bool(actual.isfinite().all())
    return float((actual.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-9))


def bound(backend, dtype: torch.dtype) -> float:
    declared = row_for(backend.capabilities, "cuda").tolerance.relative_l2
    return declared or 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("label", CASES)
def test_exact_or_refused(name, label):
    backend = available(name)
    tensors, mask, options, extra = call_of(**CASES[label])
    call = canonicalise(*tensors, mask, attention_kwargs=extra, **options)
    spec = spec_of(call)
    skip_if_refused(backend, spec)
    before = [tensor.detach().clone() for tensor in tensors]
    expected = attention(call)
    result = dispatch_attention_fn(*tensors, mask, attention_kwargs=extra, backend=name, **options)
    out, lse = result if extra["return_lse"] else (result, None)
    limit = bound(backend, call.query.dtype)
    error = relative_error(out, expected.out)
    print(f"{name} {label}: relative error {error:.2e}, allowed {limit:.2e}")
    assert error <= limit
    if lse is not None:
        empty = expected.lse == float("-inf")
        assert torch.equal(lse == float("-inf"), empty)
        assert float((lse - expected.lse)[~empty].abs().max()) < (0.1 if backend.quantised else 0.01)
    if call.mask is not None and call.mask.kind == "key_padding":
        assert (out[1] == 0).all()
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(tensors, before, strict=True)), "an input was changed"
    if spec.grad:
        weight = torch.randn_like(out)
        gradients = torch.autograd.grad(out, tensors, weight)
        for one, other in zip(gradients, torch.autograd.grad(expected.out, tensors, weight), strict=True):
            assert relative_error(one, other) <= 2 * limit


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grad", [False, True])
def test_first_use_self_test_passes(name, dtype, grad):
    backend = available(name)
    for head_dim in (64, 128):
        tensors = [torch.zeros(1, 4, 2, head_dim, dtype=dtype, device="cuda", requires_grad=grad) for _ in range(3)]
        spec = spec_of(canonicalise(*tensors))
        skip_if_refused(backend, spec)
        assert self_test.reasons(backend, spec) == ()


@pytest.mark.parametrize("name", BACKENDS)
def test_fullgraph(name):
    backend = available(name)
    tensors, *_ = call_of()
    torch.compiler.reset()

    @torch.compile(fullgraph=True)
    def attend(query, key, value):
        return dispatch_attention_fn(query * 1.0, key, value, backend=name)

    out = attend(*tensors)
    assert relative_error(out, attention(canonicalise(*tensors)).out) <= bound(backend, out.dtype)


@pytest.mark.parametrize("name", [name for name in BACKENDS if BACKENDS[name].capabilities[0].gradients])
def test_fullgraph_gradients(name):
    backend = available(name)
    tensors, *_ = call_of(grad=True)
    skip_if_refused(backend, spec_of(canonicalise(*tensors)))
    torch.compiler.reset()

    @torch.compile(fullgraph=True)
    def attend(query, key, value):
        return dispatch_attention_fn(query * 1.0, key, value, backend=name)

    out = attend(*tensors)
    weight = torch.randn_like(out)
    gradients = torch.autograd.grad(out, tensors, weight)
    expected = torch.autograd.grad(attention(canonicalise(*tensors)).out, tensors, weight)
    for one, other in zip(gradients, expected, strict=True):
        assert relative_error(one, other) <= 2 * bound(backend, out.dtype)


# SageAttention sizes its scales by a value that it reads back from the device.
@pytest.mark.parametrize(
    "name",
    [name for name in BACKENDS if "key_padding" in BACKENDS[name].capabilities[0].masks and name != "sage_varlen"],
)
def test_packing_does_not_wait_for_the_device(name):
    available(name)
    tensors, mask, options, _ = call_of(mask="padding")
    with torch.no_grad():
        dispatch_attention_fn(*tensors, mask, backend=name, **options)
        fresh = mask.clone()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            dispatch_attention_fn(*tensors, fresh, backend=name, **options)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif("REPORT_VERSIONS" not in os.environ, reason="set REPORT_VERSIONS=1 to print what is installed")
def test_report_versions(capsys):
    with capsys.disabled():
        print(f"\ntorch {torch.__version__}, {torch.cuda.get_device_name()}")
        for name in BACKENDS:
            print(registry.status(name))
