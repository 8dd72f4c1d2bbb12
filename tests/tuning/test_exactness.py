"""Sampled errors agree with the whole: right outputs pass, each wrong one is seen."""

from __future__ import annotations

import pytest
import torch

from attention_dispatch.call import canonicalise, spec_of
from attention_dispatch.registry import get
from attention_dispatch.testing import WRONG_BACKENDS
from attention_dispatch.tuning import exactness
from attention_dispatch.tuning.candidates import gradients

from .fakes import backend

ARGUMENTS = {
    "plain": {},
    "causal": {"is_causal": True},
    "window": {"attention_kwargs": {"window_size": (4, 2)}},
    "softcap": {"attention_kwargs": {"softcap": 2.0}},
    "scale": {"scale": 0.7},
}


def tensors(k_len: int = 40, kv_heads: int = 4):
    generator = torch.Generator().manual_seed(3)
    sizes = [(24, 4), (k_len, kv_heads), (k_len, kv_heads)]
    return [torch.randn(2, length, heads, 16, generator=generator) for length, heads in sizes]


def masks(name: str):
    generator = torch.Generator().manual_seed(4)
    return {
        "none": None,
        "key_padding": torch.arange(40)[None, None, None] < torch.tensor([30, 0])[:, None, None, None],
        "bool": torch.rand(2, 4, 24, 40, generator=generator) > 0.5,
        "bias": torch.randn(1, 4, 24, 40, generator=generator),
    }[name]


@pytest.mark.parametrize("mask", ["none", "key_padding", "bool", "bias"])
@pytest.mark.parametrize("arguments", ARGUMENTS.values(), ids=ARGUMENTS)
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_the_reference_has_no_error(mask, arguments, kv_heads):
    call = canonicalise(*tensors(kv_heads=kv_heads), masks(mask), enable_gqa=kv_heads != 4, **arguments)
    reference = get("reference")
    error = exactness.error_of(reference.forward(call).out, exactness.sample(call))
    assert error.relative_l2 < 1e-6 or error.largest < 1e-6
    assert exactness.problem(reference, spec_of(call), error) is None


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("ignores_causal", {"is_causal": True}),
        ("ignores_window", {"attention_kwargs": {"window_size": (4, 2)}}),
        ("ignores_scale", {"scale": 0.7}),
        ("ignores_softcap", {"attention_kwargs": {"softcap": 2.0}}),
    ],
)
def test_wrong_backends_are_seen(name, arguments):
    wrong = WRONG_BACKENDS[name]
    call = canonicalise(*tensors(), **arguments)
    error = exactness.error_of(wrong.forward(call).out, exactness.sample(call))
    assert "relative error" in exactness.problem(wrong, spec_of(call), error)


def test_dropout_and_block_masks_have_no_exact_rows():
    assert exactness.sample(canonicalise(*tensors(), dropout_p=0.5)) is None


@pytest.mark.parametrize("mask", ["none", "key_padding", "bool", "bias"])
@pytest.mark.parametrize("arguments", ARGUMENTS.values(), ids=ARGUMENTS)
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_the_reference_has_right_gradients(mask, arguments, kv_heads):
    argument = masks(mask)
    if mask == "bias":
        argument.requires_grad_()
    leaves = [tensor.requires_grad_() for tensor in tensors(kv_heads=kv_heads)]
    call = canonicalise(*leaves, argument, enable_gqa=kv_heads != 4, **arguments)
    exact = exactness.sample_gradients(call)
    reference = get("reference")
    errors = exactness.gradient_errors(gradients(reference, call, exact.grad_out), exact)
    assert set(errors) == {"query", "key", "value"} | ({"mask"} if mask == "bias" else set())
    # A whole batch sample without keys has gradients of zero.
    assert all(error.relative_l2 < 1e-5 or error.largest < 1e-6 for error in errors.values())
    assert all(bool(gradient.any()) for gradient in exact.exact.values()) or mask == "key_padding"


@pytest.mark.parametrize("k_len", [1, 40])
def test_only_needed_gradients_are_compared_and_a_single_key_has_none_to_be_wrong_about(k_len):
    query, key, value = tensors(k_len)
    call = canonicalise(query.requires_grad_(), key.requires_grad_(), value)
    exact = exactness.sample_gradients(call)
    flash = get("_native_flash")
    errors = exactness.gradient_errors(gradients(flash, call, exact.grad_out), exact)
    assert set(errors) == {"query", "key"} and exactness.gradient_problem(flash, spec_of(call), errors) is None


def test_a_wrong_gradient_is_seen():
    call = canonicalise(*[tensor.requires_grad_() for tensor in tensors()])
    exact = exactness.sample_gradients(call)
    wrong = backend("fake_gradient")
    errors = exactness.gradient_errors(gradients(wrong, call, exact.grad_out), exact)
    assert "gradient of key" in exactness.gradient_problem(wrong, spec_of(call), errors)
    found = gradients(wrong, call, exact.grad_out)
    found["query"] = found["query"] * float("nan")
    errors = exactness.gradient_errors(found, exact)
    assert "gradient of query is not finite" in exactness.gradient_problem(wrong, spec_of(call), errors)
