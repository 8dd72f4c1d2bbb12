"""Every row over its fakes: equal to the oracle, or refused with the reason its declared capabilities predict."""

from __future__ import annotations

import itertools

import pytest
import torch
from family_rows import ROWS

from attention_dispatch import BackendRejectedError, dispatch_attention_fn, registry
from attention_dispatch.backends.reference import attention
from attention_dispatch.call import canonicalise, spec_of
from attention_dispatch.capabilities import reasons_against

BATCH, HEADS = 3, 4


def padding(kind: str, length: int) -> torch.Tensor:
    keep = torch.ones(BATCH, length, dtype=torch.bool)
    if kind == "left":
        keep[0, :2] = keep[1, :4] = False
    elif kind == "right":
        keep[0, -1:] = keep[2, 2:] = False
    elif kind == "interior":
        keep[0, 2:4] = keep[1, 1:5] = False
    elif kind == "scattered":
        keep[:] = torch.rand(BATCH, length, generator=torch.Generator().manual_seed(3)) < 0.6
    elif kind == "empty":
        keep[1] = False
        keep[2, 3] = False
    return keep


def mask_of(kind: str, q_len: int, k_len: int) -> torch.Tensor | None:
    generator = torch.Generator().manual_seed(4)
    if kind == "none":
        return None
    if kind == "bool":
        return torch.rand(BATCH, 1, q_len, k_len, generator=generator) < 0.7
    if kind == "bool_per_head":
        mask = torch.rand(BATCH, HEADS, q_len, k_len, generator=generator) < 0.7
        mask[0, 1, 2] = False
        return mask
    if kind == "bias":
        return torch.randn(1, HEADS, q_len, k_len, generator=generator)
    if kind == "bias_inf":
        bias = torch.randn(BATCH, 1, q_len, k_len, generator=generator)
        bias[0, 0, 1] = float("-inf")
        bias[1, 0, :, 2:] = float("-inf")
        return bias
    return padding(kind, k_len)[:, None, None, :]


def case(q_len=9, k_len=9, kv_heads=HEADS, dim=64, dim_v=None, dtype=torch.bfloat16, mask="none", grad=False, **call):
    return {
        "q_len": q_len,
        "k_len": k_len,
        "kv_heads": kv_heads,
        "dim": dim,
        "dim_v": dim_v,
        "dtype": dtype,
        "mask": mask,
        "grad": grad,
        "call": call,
    }


MASKS = ("left", "right", "interior", "scattered", "empty", "bool", "bool_per_head", "bias", "bias_inf")
CASES = {
    "plain": case(),
    "fp16": case(dtype=torch.float16),
    "fp32": case(dtype=torch.float32),
    "one_query": case(q_len=1),
    "cross": case(q_len=5, k_len=9),
    "cross_more_queries": case(q_len=9, k_len=5),
    "scale": case(scale=0.3),
    "gqa": case(kv_heads=2),
    "mqa_lse": case(kv_heads=1, lse=True),
    "lse": case(lse=True),
    "deterministic": case(deterministic=True, grad=True),
    "softcap": case(softcap=2.0),
    "softcap_grad": case(softcap=2.0, grad=True),
    "grad": case(grad=True),
    "grad_gqa": case(grad=True, kv_heads=2),
    "grad_lse": case(grad=True, lse=True),
    "grad_lse_causal": case(grad=True, lse=True, is_causal=True),
    **{f"dim_{dim}": case(dim=dim, lse=dim % 16 == 0) for dim in (40, 72, 76, 80, 96, 128, 192, 256)},
    "dim_v": case(dim=192, dim_v=128),
    "dim_v_small": case(dim=64, dim_v=32, grad=True),
    **{
        f"causal_{q}x{k}_{extra}": case(q_len=q, k_len=k, is_causal=True, lse=extra == "lse", grad=extra == "grad")
        for (q, k), extra in itertools.product(((9, 9), (5, 9), (9, 5), (1, 9)), ("lse", "grad"))
    },
    **{
        f"window_{left}_{right}_{q}x{k}{'_causal' if causal else ''}": case(
            q_len=q, k_len=k, window_size=(left, right), is_causal=causal, lse=True
        )
        for (left, right), (q, k), causal in itertools.product(
            ((2, 1), (0, 0), (3, -1), (-1, 2)), ((9, 9), (5, 9), (9, 5)), (False, True)
        )
    },
    **{f"mask_{mask}{'_lse' if lse else ''}": case(mask=mask, lse=lse) for mask in MASKS for lse in (False, True)},
    **{f"mask_{mask}_grad": case(mask=mask, grad=True, kv_heads=2) for mask in MASKS},
    **{f"mask_{mask}_cross": case(mask=mask, q_len=4, k_len=9) for mask in MASKS},
    **{f"mask_{mask}_causal": case(mask=mask, is_causal=True, lse=True) for mask in MASKS},
    "mask_left_window": case(mask="left", window_size=(2, 2)),
    "mask_bias_softcap": case(mask="bias", softcap=2.0),
}


def arguments_of(case: dict):
    generator = torch.Generator().manual_seed(7)
    shapes = (
        (BATCH, case["q_len"], HEADS, case["dim"]),
        (BATCH, case["k_len"], case["kv_heads"], case["dim"]),
        (BATCH, case["k_len"], case["kv_heads"], case["dim_v"] or case["dim"]),
    )
    tensors = [torch.randn(shape, generator=generator).to(case["dtype"]) for shape in shapes]
    options = dict(case["call"])
    extra = {name: options.pop(name) for name in ("window_size", "softcap", "deterministic") if name in options}
    if options.pop("lse", False):
        extra["return_lse"] = True
    mask = mask_of(case["mask"], case["q_len"], case["k_len"])
    return tensors, mask, {"enable_gqa": True, **options}, extra


def differs(actual, expected, dtype) -> str:
    """Empty if equal within twice the rounding of the dtype, else the difference."""
    if actual.shape != expected.shape:
        return f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    infinite = torch.isinf(expected)
    if not torch.equal(torch.isinf(actual), infinite) or not torch.isfinite(actual[~infinite]).all():
        return "infinities or NaN where the oracle has none"
    error = (actual.double() - expected.double())[~infinite].abs()
    bound = 4 * torch.finfo(dtype).eps * (1 + expected.double()[~infinite].abs())
    return "" if bool((error <= bound).all()) else f"error {float(error.max()):.3g}"


def check(backend, case: dict) -> str:
    """Run one case; returns ``"computed"`` or ``"refused"``."""
    tensors, mask, options, extra = arguments_of(case)
    for tensor in tensors:
        tensor.requires_grad_(case["grad"])
    call = canonicalise(*tensors, mask, attention_kwargs=extra, **options)
    spec = spec_of(call)
    predicted = {r.code for r in (*reasons_against(backend.capabilities, spec), *backend.extra_reasons(spec))}
    before = [tensor.detach().clone() for tensor in tensors]
    if predicted:
        with pytest.raises(BackendRejectedError) as caught:
            dispatch_attention_fn(*tensors, mask, attention_kwargs=extra, backend=backend.name, **options)
        assert set(caught.value.codes) == predicted
        assert all(reason.fix for reason in caught.value.reasons)
        return "refused"
    expected = attention(call)
    result = dispatch_attention_fn(*tensors, mask, attention_kwargs=extra, backend=backend.name, **options)
    out, lse = result if extra.get("return_lse") else (result, None)
    assert out.dtype == case["dtype"]
    assert not differs(out, expected.out, case["dtype"])
    if lse is not None:
        assert lse.dtype == torch.float32 and not lse.requires_grad
        assert not differs(lse, expected.lse, torch.bfloat16)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(tensors, before, strict=True)), "an input was changed"
    if case["grad"]:
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out.dtype)
        actual = torch.autograd.grad(out, tensors, weight)
        wanted = torch.autograd.grad(expected.out, tensors, weight)
        for name, one, other in zip("qkv", actual, wanted, strict=True):
            assert not differs(one, other, case["dtype"]), f"gradient of {name}: {differs(one, other, case['dtype'])}"
    else:
        assert not out.requires_grad
    return "computed"


@pytest.mark.parametrize(("name", "record"), ROWS)
def test_every_case_is_exact_or_refused_with_the_predicted_reason(name, record, on_cpu):
    backend, calls = on_cpu(name, record)
    assert registry.status(name).available, registry.status(name)
    outcomes = {}
    for label, one in CASES.items():
        try:
            outcomes[label] = check(backend, one)
        except (AssertionError, TypeError, RuntimeError, ValueError) as error:
            raise AssertionError(f"{name} over {record}, case {label}: {error}") from error
    computed = {label for label, outcome in outcomes.items() if outcome == "computed"}
    assert {"plain", "scale", "gqa", "cross", "causal_9x9_lse" if backend.capabilities[0].lse else "plain"} <= (
        computed | ({"causal_9x9_lse"} if record in ("sageattention-1.0.6", "flash_attn_3-tensor") else set())
    )
    assert calls.dropped == []


@pytest.mark.parametrize(("name", "record"), ROWS)
def test_strided_views_of_packed_projections(name, record, on_cpu):
    on_cpu(name, record)
    packed = torch.randn(2, 9, 3, HEADS, 64, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    query, key, value = packed.unbind(2)
    expected = attention(canonicalise(query, key, value))
    copy = packed.clone()
    out = dispatch_attention_fn(query, key, value, backend=name)
    assert not differs(out, expected.out, torch.bfloat16)
    assert torch.equal(packed, copy)


@pytest.mark.parametrize(("name", "record"), [row for row in ROWS if row[0] in ("flash", "flash_varlen", "xformers")])
def test_dropout_drops_and_keeps_the_mean(name, record, on_cpu):
    on_cpu(name, record)
    torch.manual_seed(0)
    query, key = torch.zeros(1, 64, 4, 64).bfloat16(), torch.zeros(1, 64, 4, 64).bfloat16()
    value = torch.ones(1, 64, 4, 64).bfloat16()
    out = dispatch_attention_fn(query, key, value, dropout_p=0.5, backend=name)
    assert 0.9 < float(out.float().mean()) < 1.1
    assert float(out.float().std()) > 0.05
