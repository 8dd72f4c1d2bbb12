from __future__ import annotations

import math

import pytest
import torch

from .exact import CASES, Case, exact_attention, relative_error, same_lse

# Relative L2 error. INT8 scores alone give about 1.2e-2 on normal inputs, E4M3 probabilities and values 3.6e-2.
TOLERANCE = {"fp8": 6e-2, "fp16": 2.5e-2}


def tolerance(pv: str, device: str, least: float | None = None) -> float:
    """The interpreter truncates where the GPU rounds to E4M3, which doubles that part of the error."""
    return (least or TOLERANCE[pv]) * (2.4 if device == "cpu" and pv == "fp8" else 1.0)


@pytest.mark.parametrize("pv", TOLERANCE)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_forward_is_close(case: Case, pv: str, device: str) -> None:
    from attention_dispatch.kernels import sage_attention

    inputs, arguments = case.inputs(torch.float16, device), case.arguments(device)
    inputs[1].add_(2 * torch.randn_like(inputs[1][:, :1]))
    out, lse = sage_attention(*inputs, **arguments, pv=pv, return_lse=True)
    want, want_lse = exact_attention(*inputs, **arguments)
    assert relative_error(out, want) < tolerance(pv, device)
    assert same_lse(lse, want_lse, 0.2)


@pytest.mark.parametrize("offset", [2.0, 10.0])
def test_a_common_offset_of_the_keys_costs_nothing(offset: float, device: str) -> None:
    from attention_dispatch.kernels import sage_attention

    query, key, value = Case("", 1, 128, 384, 2, 2, 64, 64).inputs(torch.float16, device)
    key += offset * torch.randn_like(key[:, :1])
    out, _ = sage_attention(query, key, value, scale=0.125, pv="fp16")
    want, _ = exact_attention(query, key, value, scale=0.125)
    assert relative_error(out, want) < 1.6e-2
    out, _ = sage_attention(query, key, value, scale=0.125, pv="fp8")
    assert relative_error(out, want) < tolerance("fp8", device, 4.5e-2)
    assert float(torch.cosine_similarity(out.double().flatten(), want.flatten(), 0)) > (0.994 if device == "cpu" else 0.999)


def test_heavy_tailed_channels(device: str) -> None:
    from attention_dispatch.kernels import sage_attention

    query, key, value = Case("", 1, 64, 384, 2, 2, 64, 64).inputs(torch.float16, device)
    value *= torch.logspace(-3, 3, 64, device=device).half()
    query[..., 5] *= 8
    out, _ = sage_attention(query, key, value, scale=0.125, pv="fp8")
    want, _ = exact_attention(query, key, value, scale=0.125)
    for channel in (0, 31, 63):
        assert relative_error(out[..., channel], want[..., channel]) < tolerance("fp8", device, 7e-2)


def test_smooth_v_removes_a_common_offset_of_the_values(device: str) -> None:
    from attention_dispatch.kernels import sage_attention

    query, key, value = Case("", 1, 64, 384, 2, 2, 64, 64).inputs(torch.float16, device)
    value += 20 * torch.randn_like(value[:, :1])
    padding = torch.ones(1, 384, dtype=torch.bool, device=device)
    padding[:, :3] = False
    want, _ = exact_attention(query, key, value, scale=0.125, key_padding=padding)
    plain, _ = sage_attention(query, key, value, scale=0.125, key_padding=padding, pv="fp8")
    smooth, _ = sage_attention(query, key, value, scale=0.125, key_padding=padding, pv="fp8", smooth_v=True)
    assert relative_error(smooth, want) < 0.2 * relative_error(plain, want)
    hidden, _ = sage_attention(query, key, value, scale=0.125, key_padding=padding & False, pv="fp8", smooth_v=True)
    assert torch.equal(hidden, torch.zeros_like(hidden))


@pytest.mark.parametrize("pv", TOLERANCE)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_inf_reach_the_output(bad: float, pv: str, device: str) -> None:
    from attention_dispatch.kernels import sage_attention

    for index in range(3):
        inputs = Case("", 1, 130, 130, 1, 1, 16, 16).inputs(torch.float16, device)
        inputs[index][0, 70, 0, 3] = bad
        out, _ = sage_attention(*inputs, scale=0.25, pv=pv)
        want, _ = exact_attention(*inputs, scale=0.25)
        assert bool((~want.isfinite()).any())
        assert not bool((out.isfinite() & ~want.isfinite()).any())


@pytest.mark.parametrize("pv", TOLERANCE)
def test_zeros_and_huge_values(pv: str, device: str) -> None:
    from attention_dispatch.kernels import sage_attention

    query, key, value = Case("", 1, 40, 150, 1, 1, 16, 16).inputs(torch.float16, device)
    query[:, 3] = 0
    key[:, :128] = 0
    out, _ = sage_attention(query, key, value, scale=0.25, pv=pv)
    assert relative_error(out, exact_attention(query, key, value, scale=0.25)[0]) < tolerance(pv, device)
    zeros = torch.zeros_like(value)
    assert torch.equal(sage_attention(query, key, zeros, scale=0.25, pv=pv)[0], torch.zeros_like(query))
    huge = value.clamp(-1, 1) * 60000
    out, _ = sage_attention(query, key, huge, scale=0.25, pv=pv)
    assert relative_error(out, exact_attention(query, key, huge, scale=0.25)[0]) < tolerance(pv, device)


def test_what_padding_hides_may_be_nan(device: str) -> None:
    from attention_dispatch.kernels import sage_attention

    clean = Case("", 1, 33, 300, 1, 1, 32, 32).inputs(torch.float16, device)
    query, key, value = (x.clone() for x in clean)
    visible = torch.arange(300, device=device)[None] < 150
    key[:, 150:] = math.nan
    value[:, 150:] = math.inf
    want, _ = exact_attention(*clean, scale=0.2, key_padding=visible)
    for pv in TOLERANCE:
        out, _ = sage_attention(query, key, value, scale=0.2, key_padding=visible, pv=pv)
        assert relative_error(out, want) < tolerance(pv, device)


def test_refusals_say_why(device: str) -> None:
    from attention_dispatch.kernels import sage_attention

    inputs = Case("", 1, 4, 4, 1, 1, 16, 16).inputs(torch.float32, device)
    with pytest.raises(TypeError, match="float32 is not supported"):
        sage_attention(*inputs, scale=1.0)
    with pytest.raises(ValueError, match="pv='int4'"):
        sage_attention(*(x.half() for x in inputs), scale=1.0, pv="int4")
