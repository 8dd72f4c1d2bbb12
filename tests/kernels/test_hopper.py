"""The kernels written in Gluon for sm_90: that they are the ones that run, and that they answer as the plain Triton kernels do."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from .exact import Case, exact_attention, relative_error, same_lse

pytestmark = pytest.mark.gpu

# Relative L2 error of the output, absolute error of the lse
TOLERANCE = {"flash": (5e-3, 1e-3), "sage": (6e-2, 0.2)}
CASES = [
    Case("one query, one key", 1, 1, 1, 2, 1, 128, 128),
    Case("one tile", 1, 64, 128, 2, 2, 128, 128),
    Case("one more than a tile", 1, 129, 129, 2, 2, 128, 128),
    Case("tails, gqa", 2, 700, 900, 4, 2, 128, 128),
    Case("full tiles", 1, 256, 1024, 3, 3, 128, 128),
    Case("head_dim 72 and 120", 2, 200, 300, 2, 1, 72, 120),
    Case("causal", 1, 1000, 1000, 2, 2, 128, 128, ("causal",)),
    Case("causal, more queries", 2, 400, 37, 2, 1, 128, 128, ("causal",)),
    Case("causal, more keys", 2, 37, 700, 2, 1, 128, 128, ("causal",)),
]
SAGE_CASES = [
    Case("head_dim 64", 2, 700, 900, 4, 2, 64, 64),
    Case("head_dim 64, full tiles", 1, 192, 512, 2, 2, 64, 64),
    Case("head_dim 40 and 56", 2, 100, 300, 2, 1, 40, 56),
    Case("head_dim 64, causal", 1, 500, 500, 2, 2, 64, 64, ("causal",)),
    Case("negative scale", 1, 100, 300, 2, 2, 128, 128, ("negative",)),
]
BOTH = [pytest.param(name, case, id=f"{name}, {case.name}") for name in TOLERANCE for case in CASES]


def run(name: str, inputs: tuple[Tensor, ...], **arguments: Any) -> tuple[Tensor, Tensor]:
    from attention_dispatch.kernels import flash_attention, sage_attention

    out, lse = (flash_attention if name == "flash" else sage_attention)(*inputs, return_lse=True, **arguments)
    assert lse is not None
    return out, lse


@pytest.fixture
def launches(cuda: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the Gluon kernels launched so far, from here on."""
    from attention_dispatch.kernels import hopper

    if not hopper._is_checked_hopper(torch.cuda.current_device()):
        pytest.skip("these kernels run on sm_90 with Triton 3.6 alone")
    from attention_dispatch.kernels import hopper_flash, hopper_sage

    seen: list[str] = []

    def noting(name: str, launch: Callable[..., None]) -> Callable[..., None]:
        def noted(*arguments: Any) -> None:
            seen.append(name)
            launch(*arguments)

        return noted

    monkeypatch.setattr(hopper_flash, "launch_flash_hopper", noting("flash", hopper_flash.launch_flash_hopper))
    monkeypatch.setattr(hopper_sage, "launch_sage_hopper", noting("sage", hopper_sage.launch_sage_hopper))
    return seen


@pytest.mark.parametrize(
    ("name", "case"), [*BOTH, *(pytest.param("sage", case, id=f"sage, {case.name}") for case in SAGE_CASES)]
)
def test_close_to_float64(name: str, case: Case, launches: list[str], cuda: str) -> None:
    inputs, arguments = case.inputs(torch.bfloat16, cuda), case.arguments(cuda)
    inputs[1].add_(2 * torch.randn_like(inputs[1][:, :1]))
    out, lse = run(name, inputs, **arguments)
    assert launches == [name]
    want, want_lse = exact_attention(*inputs, **arguments)
    tolerance, lse_tolerance = TOLERANCE[name]
    assert relative_error(out, want) < tolerance
    assert same_lse(lse, want_lse, lse_tolerance)


@pytest.mark.parametrize("name", TOLERANCE)
def test_views_and_float16(name: str, launches: list[str], cuda: str) -> None:
    packed = torch.randn(2, 300, 3, 4, 128, device=cuda, dtype=torch.float16)
    inputs = packed[:, :, 0], packed[:, 10:200, 1], packed[:, 10:200, 2]
    out, _ = run(name, inputs, scale=0.1)
    assert launches == [name]
    assert relative_error(out, exact_attention(*inputs, scale=0.1)[0]) < TOLERANCE[name][0]
    heads_first = tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs)
    assert torch.equal(run(name, heads_first, scale=0.1)[0], out)


@pytest.mark.parametrize("name", TOLERANCE)
def test_what_they_do_not_take_goes_to_the_plain_kernels(name: str, launches: list[str], cuda: str) -> None:
    inputs = Case("", 1, 100, 140, 2, 2, 128, 128).inputs(torch.bfloat16, cuda)
    for arguments in (
        {"softcap": 2.0},
        {"window_size": (8, -1)},
        {"key_padding": torch.rand(1, 140, device=cuda) > 0.3},
        {"mask": torch.rand(1, 1, 100, 140, device=cuda) > 0.3},
        {"bias": torch.randn(1, 1, 100, 140, device=cuda)},
    ):
        out, _ = run(name, inputs, scale=0.1, **arguments)
        assert relative_error(out, exact_attention(*inputs, scale=0.1, **arguments)[0]) < TOLERANCE[name][0]
    assert launches == []


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", TOLERANCE)
def test_nan_and_inf_reach_the_output(name: str, bad: float, launches: list[str], cuda: str) -> None:
    for index in range(3):
        inputs = Case("", 1, 130, 300, 1, 1, 128, 128).inputs(torch.bfloat16, cuda)
        inputs[index][0, 70, 0, 3] = bad
        out, _ = run(name, inputs, scale=0.1)
        want, _ = exact_attention(*inputs, scale=0.1)
        assert bool((~want.isfinite()).any())
        assert not bool((out.isfinite() & ~want.isfinite()).any())
    assert launches == [name] * 3


def test_smooth_v_and_a_large_offset_of_the_values(launches: list[str], cuda: str) -> None:
    from attention_dispatch.kernels import sage_attention

    query, key, value = Case("", 1, 300, 2000, 2, 2, 128, 128).inputs(torch.bfloat16, cuda)
    value += 20 * torch.randn_like(value[:, :1])
    want, _ = exact_attention(query, key, value, scale=0.1)
    plain, _ = sage_attention(query, key, value, scale=0.1, pv="fp8")
    smooth, _ = sage_attention(query, key, value, scale=0.1, pv="fp8", smooth_v=True)
    assert launches == ["sage", "sage"]
    assert relative_error(smooth, want) < 0.5 * relative_error(plain, want)
    assert relative_error(plain, want) < 2e-2


@pytest.mark.parametrize("length", [4096, 4100])
def test_the_same_answer_as_the_plain_kernel(length: int, launches: list[str], cuda: str) -> None:
    from attention_dispatch.kernels import sage
    from attention_dispatch.kernels.tiles import sage_tile

    inputs = Case("", 1, length, length, 4, 2, 128, 128).inputs(torch.bfloat16, cuda)
    one, _ = run("sage", inputs, scale=0.1)
    other, _ = sage.sage_attention_forward(*inputs, scale=0.1, tile=sage_tile(inputs[0], 128, True))
    assert launches == ["sage"]
    # The same integers, scales and roundings; only sums are taken in another order.
    assert relative_error(one, other) < 1e-2


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(sorted(TOLERANCE)),
    batch=st.integers(1, 2),
    seq_q=st.integers(1, 400),
    seq_k=st.integers(1, 600),
    heads_kv=st.integers(1, 2),
    group=st.integers(1, 2),
    causal=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_any_lengths(
    name: str, batch: int, seq_q: int, seq_k: int, heads_kv: int, group: int, causal: bool, seed: int
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA GPU")
    torch.manual_seed(seed)
    inputs = Case("", batch, seq_q, seq_k, heads_kv * group, heads_kv, 128, 128).inputs(torch.bfloat16, "cuda")
    out, lse = run(name, inputs, scale=0.1, is_causal=causal)
    want, want_lse = exact_attention(*inputs, scale=0.1, is_causal=causal)
    tolerance, lse_tolerance = TOLERANCE[name]
    # Of a handful of keys the rounding to E4M3 does not average out.
    assert relative_error(out, want) < tolerance * (1.5 if name == "sage" else 1.0)
    assert same_lse(lse, want_lse, lse_tolerance)
