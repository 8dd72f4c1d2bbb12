"""Backends that fail in every way a kernel can; importing this module registers nothing."""

from __future__ import annotations

import os
import time

import torch

from attention_dispatch.backends.reference import CAPABILITIES, attention
from attention_dispatch.call import AttentionCall, AttentionOutput, CallSpec
from attention_dispatch.errors import Reason
from attention_dispatch.registry import Backend, register_backend


def _crashes(call: AttentionCall) -> AttentionOutput:
    os._exit(7)


def _hangs(call: AttentionCall) -> AttentionOutput:
    time.sleep(600)
    return attention(call)


def _returns_nan(call: AttentionCall) -> AttentionOutput:
    output = attention(call)
    return output._replace(out=output.out * float("nan"))


def _lies(call: AttentionCall) -> AttentionOutput:
    """Fast, and the same for every query."""
    mean = call.value.mean(dim=1, keepdim=True)
    groups = call.query.shape[2] // call.value.shape[2]
    out = mean.repeat_interleave(groups, dim=2).expand(-1, call.query.shape[1], -1, -1)
    lse = torch.zeros(call.query.shape[0], call.query.shape[2], call.query.shape[1])
    return AttentionOutput(out, lse if call.return_lse else None)


def _right_with_wrong_gradients(call: AttentionCall) -> AttentionOutput:
    """The gradient of the key is twice what it should be."""
    return attention(call.replaced(key=2 * call.key - call.key.detach()))


def _corrupts(call: AttentionCall) -> AttentionOutput:
    """On CUDA, a failed assertion on the device, after which its process can compute nothing more."""
    index = torch.full((1,), 5, device=call.query.device)
    torch.zeros(2, device=call.query.device)[index]
    return attention(call)


def _raises(call: AttentionCall) -> AttentionOutput:
    raise RuntimeError("no kernel image is available")


FORWARDS = {
    "fake_crash": _crashes,
    "fake_hang": _hangs,
    "fake_nan": _returns_nan,
    "fake_lie": _lies,
    "fake_raise": _raises,
    "fake_corrupt": _corrupts,
    "fake_right": attention,
    "fake_gradient": _right_with_wrong_gradients,
    "fake_dies_at_import": attention,
    "fake_refuses": attention,
}


def _exit() -> None:
    os._exit(9)


def _refuses(spec: CallSpec) -> tuple[Reason, ...]:
    return (Reason("self_test", "its first-use self-test failed", "use backend='native'."),)


def backend(name: str) -> Backend:
    """A fake, not registered; it declares what the reference does."""
    special = {"fake_dies_at_import": {"load": _exit}, "fake_refuses": {"extra_reasons": _refuses}}.get(name, {})
    return Backend(name=name, family="fakes", capabilities=(CAPABILITIES,), forward=FORWARDS[name], **special)


def register() -> None:
    """Register all of them."""
    for name in FORWARDS:
        register_backend(backend(name), replace=True)
