"""The kernels through the dispatcher: arguments arrive, results are canonical."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from attention_dispatch import self_test
from attention_dispatch.backends import triton
from attention_dispatch.call import AttentionCall, AttentionOutput, CallSpec, canonicalise, spec_of
from attention_dispatch.masks import normalise

from .exact import Case, exact_attention, relative_error, same_lse

TOLERANCE = {"FLASH": 1.5e-3, "SAGE": 0.15, "SAGE_FP16": 0.03}


def _spec(device: str) -> CallSpec:
    return spec_of(canonicalise(*[torch.zeros(1, 4, 2, 64, dtype=torch.float16, device=device)] * 3))


@pytest.mark.parametrize("name", TOLERANCE)
def test_what_was_compiled_here_is_proven_on_first_use(name: str, device: str) -> None:
    backend = getattr(triton, name)
    backend.load()
    self_test.forget()
    assert backend.external
    assert self_test.reasons(backend, _spec(device)) == ()


def test_the_backward_pass_is_proven_when_gradients_are_needed(device: str) -> None:
    triton.FLASH.load()
    self_test.forget()
    tensors = [torch.zeros(1, 4, 2, 32, dtype=torch.float16, device=device, requires_grad=True) for _ in range(3)]
    assert self_test.reasons(triton.FLASH, spec_of(canonicalise(*tensors))) == ()


@pytest.mark.parametrize("masked", [True, False])
def test_a_kernel_that_was_compiled_wrong_is_found(masked: bool, device: str) -> None:
    """The masked and the plain kernel may be two: either alone can be wrong."""

    def forward(call: AttentionCall) -> AttentionOutput:
        out, lse = triton.FLASH.forward(call)
        return AttentionOutput(torch.roll(out, 1, 1) if masked == (call.mask is not None) else out, lse)

    triton.FLASH.load()
    self_test.forget()
    [reason] = self_test.reasons(replace(triton.FLASH, forward=forward), _spec(device))
    self_test.forget()
    assert reason.code == "self_test" and "relative error" in reason.what
    assert ("with a key_padding mask" in reason.what) == masked


@pytest.mark.parametrize("name", TOLERANCE)
@pytest.mark.parametrize("option", ["causal", "window", "softcap", "scattered", "mask", "bias"])
def test_arguments_arrive(name: str, option: str, device: str) -> None:
    case = Case("", 2, 37, 100, 2, 1, 32, 32, (option,))
    inputs, arguments = case.inputs(torch.float16, device), case.arguments(device)
    mask = next((arguments[kind] for kind in ("key_padding", "mask", "bias") if kind in arguments), None)
    call = AttentionCall(
        *inputs,
        mask=None if mask is None else normalise(mask, 2, 2, 37, 100, inputs[0].device),
        scale=arguments["scale"],
        is_causal=arguments.get("is_causal", False),
        window_size=arguments.get("window_size", (-1, -1)),
        softcap=arguments.get("softcap", 0.0),
        enable_gqa=True,
        return_lse=True,
    )
    backend = getattr(triton, name)
    assert backend.probe() == ()
    backend.load()
    out, lse = backend.forward(call)
    want, want_lse = exact_attention(*inputs, **arguments)
    assert relative_error(out, want) < TOLERANCE[name]
    assert same_lse(lse, want_lse, 0.2)


def test_backward_takes_a_global_lse(device: str) -> None:
    query, key, value = Case("", 1, 40, 64, 2, 2, 16, 16).inputs(torch.float32, device)
    leaves = [x.double().requires_grad_() for x in (query, key, value)]
    out, lse = exact_attention(*leaves, scale=0.25)
    grad = torch.randn_like(out)
    dq, dk, dv = torch.autograd.grad(out, leaves, grad)
    halves = []
    for part in (slice(0, 32), slice(32, 64)):
        call = AttentionCall(query, key[:, part], value[:, part], scale=0.25)
        halves.append(triton.FLASH.backward(grad.float(), call, out.detach().float(), lse.detach().float()))
    assert relative_error(halves[0][0] + halves[1][0], dq) < 1e-5
    assert relative_error(torch.cat([halves[0][1], halves[1][1]], 1), dk) < 1e-5
    assert relative_error(torch.cat([halves[0][2], halves[1][2]], 1), dv) < 1e-5


def test_lse_is_detached(device: str) -> None:
    inputs = [x.requires_grad_() for x in Case("", 1, 8, 8, 1, 1, 16, 16).inputs(torch.float32, device)]
    out, lse = triton.FLASH.forward(AttentionCall(*inputs, scale=0.25, return_lse=True))
    assert out.requires_grad
    assert not lse.requires_grad
    assert math.isfinite(float(lse.sum()))
