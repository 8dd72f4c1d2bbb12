from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from .exact import CASES, Case, exact_attention, relative_error, same_lse

TOLERANCE = {torch.float32: 2e-6, torch.float16: 1.5e-3, torch.bfloat16: 1e-2}


def ids(case: Case) -> str:
    return case.name


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES, ids=ids)
def test_forward_is_exact(case: Case, dtype: torch.dtype, device: str) -> None:
    from attention_dispatch.kernels import flash_attention_forward

    if device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter has no bfloat16 arithmetic of its own")
    inputs, arguments = case.inputs(dtype, device), case.arguments(device)
    out, lse = flash_attention_forward(*inputs, **arguments, return_lse=True)
    want, want_lse = exact_attention(*inputs, **arguments)
    assert relative_error(out, want) < TOLERANCE[dtype]
    assert same_lse(lse, want_lse, 1e-5 if dtype == torch.float32 else 2e-3)


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_backward_is_exact(case: Case, device: str) -> None:
    from attention_dispatch.kernels import flash_attention

    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    inputs, arguments = case.inputs(dtype, device), case.arguments(device)
    leaves = [x.requires_grad_() for x in inputs]
    exact_leaves = [x.detach().double().requires_grad_() for x in inputs]
    exact_arguments = dict(arguments)
    if "bias" in arguments:
        leaves.append(arguments["bias"].requires_grad_())
        exact_arguments["bias"] = arguments["bias"].detach().double().requires_grad_()
        exact_leaves.append(exact_arguments["bias"])
    out, lse = flash_attention(*leaves[:3], **arguments, return_lse=True)
    want, want_lse = exact_attention(*exact_leaves[:3], **exact_arguments)
    grad_out = torch.randn_like(out)
    grad_lse = torch.randn_like(lse).masked_fill(want_lse == -math.inf, 0.0)
    got = torch.autograd.grad((out, lse), leaves, (grad_out, grad_lse))
    finite_lse = want_lse.masked_fill(want_lse.detach() == -math.inf, 0.0)
    expected = torch.autograd.grad((want, finite_lse), exact_leaves, (grad_out.double(), grad_lse.double()))
    for mine, theirs in zip(got, expected):
        # A single visible key leaves a gradient of 0 to q and k: compare with the scale of the inputs then.
        error = (mine.double() - theirs).norm() / max(float(theirs.norm()), 1e-2 * math.sqrt(mine.numel()))
        assert error < (3e-6 if dtype == torch.float32 else 2e-2)


def test_dropout_repeats_scales_and_has_gradients(device: str) -> None:
    from attention_dispatch.kernels import flash_attention

    query, key, value = Case("", 1, 64, 96, 2, 2, 16, 16).inputs(torch.float32, device)
    arguments: dict[str, Any] = {"scale": 0.25, "dropout_p": 0.3, "dropout_seed": 11}
    # With the identity as values, the output is the matrix of dropped-out probabilities.
    identity = torch.eye(96, device=device)[None, :, None].expand(1, 96, 2, 96).contiguous()
    dropped, _ = flash_attention(query, key, identity, **arguments)
    whole, _ = flash_attention(query, key, identity, scale=0.25)
    kept = dropped.transpose(1, 2) / whole.transpose(1, 2)
    assert torch.allclose(kept[kept > 0], torch.full_like(kept[kept > 0], 1 / 0.7), rtol=1e-4)
    assert abs(float((kept > 0).float().mean()) - 0.7) < 0.02
    again, _ = flash_attention(query, key, identity, **arguments)
    other, _ = flash_attention(query, key, identity, **{**arguments, "dropout_seed": 12})
    assert torch.equal(dropped, again)
    assert not torch.equal(dropped, other)

    leaves = [x.requires_grad_() for x in (query, key, value)]
    exact_leaves = [x.detach().double().requires_grad_() for x in leaves]
    out, _ = flash_attention(*leaves, **arguments)
    want, _ = exact_attention(*exact_leaves, scale=0.25, kept=(kept > 0).double() / 0.7)
    grad_out = torch.randn_like(out)
    for mine, theirs in zip(
        torch.autograd.grad(out, leaves, grad_out), torch.autograd.grad(want, exact_leaves, grad_out.double())
    ):
        assert relative_error(mine, theirs) < 3e-6


def test_views_of_a_packed_projection_are_read_in_place(device: str) -> None:
    from attention_dispatch.kernels import flash_attention_forward

    packed = torch.randn(2, 90, 3, 4, 32, device=device)
    query, key, value = packed.unbind(2)
    out, _ = flash_attention_forward(query, key, value, scale=0.2)
    assert relative_error(out, exact_attention(query, key, value, scale=0.2)[0]) < 2e-6
    reversed_dims = torch.randn(2, 32, 4, 90, device=device).permute(0, 3, 2, 1)
    out, _ = flash_attention_forward(reversed_dims, key, value, scale=0.2)
    assert relative_error(out, exact_attention(reversed_dims, key, value, scale=0.2)[0]) < 2e-6


def test_what_padding_hides_may_be_nan(device: str) -> None:
    from attention_dispatch.kernels import flash_attention

    query, key, value = Case("", 1, 33, 200, 1, 1, 32, 32).inputs(torch.float32, device)
    visible = torch.arange(200, device=device)[None] < 150
    clean = [x.clone() for x in (query, key, value)]
    key[:, 150:] = math.nan
    value[:, 150:] = math.inf
    dirty = [x.requires_grad_() for x in (query, key, value)]
    out, _ = flash_attention(*dirty, scale=0.2, key_padding=visible)
    assert relative_error(out, exact_attention(*clean, scale=0.2, key_padding=visible)[0]) < 2e-6
    for gradient in torch.autograd.grad(out.sum(), dirty):
        assert bool(gradient.isfinite().all())


def test_nan_in_gives_nan_out(device: str) -> None:
    from attention_dispatch.kernels import flash_attention_forward

    for index in range(3):
        inputs = Case("", 1, 130, 130, 1, 1, 16, 16).inputs(torch.float32, device)
        inputs[index][0, 70, 0, 3] = math.nan
        out, _ = flash_attention_forward(*inputs, scale=0.25)
        want, _ = exact_attention(*inputs, scale=0.25)
        assert bool(want.isnan().any())
        assert torch.equal(out.isnan(), want.isnan())


def test_no_keys_and_no_queries(device: str) -> None:
    from attention_dispatch.kernels import flash_attention

    query = torch.randn(1, 3, 2, 16, device=device, requires_grad=True)
    none = torch.randn(1, 0, 2, 16, device=device)
    out, lse = flash_attention(query, none, none, scale=1.0, return_lse=True)
    assert torch.equal(out, torch.zeros_like(out))
    assert bool((lse == -math.inf).all())
    assert torch.autograd.grad(out.sum(), query)[0].abs().sum() == 0
    out, lse = flash_attention(none, query, query, scale=1.0, return_lse=True)
    assert out.shape == (1, 0, 2, 16)
    assert lse.shape == (1, 2, 0)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"key": torch.zeros(1, 4, 2, 8)}, ValueError, "shapes do not fit"),
        ({"key": torch.zeros(1, 4, 3, 16), "value": torch.zeros(1, 4, 3, 16)}, ValueError, "multiple of key heads"),
        ({"key": torch.zeros(1, 4, 2, 16).half()}, TypeError, "differ in dtype"),
        ({"mask": torch.ones(1, 1, 3, 3, dtype=torch.bool)}, ValueError, "does not broadcast"),
        ({"key_padding": torch.ones(2, 4, dtype=torch.bool)}, ValueError, "key_padding"),
    ],
)
def test_refusals_say_why(change: dict[str, Any], error: type[Exception], words: str, device: str) -> None:
    from attention_dispatch.kernels import flash_attention_forward

    arguments: dict[str, Any] = {name: torch.zeros(1, 4, 2, 16) for name in ("query", "key", "value")}
    arguments = {name: x.to(device) for name, x in {**arguments, **change}.items()}
    with pytest.raises(error, match=words):
        flash_attention_forward(**arguments, scale=1.0)
