"""A default device of the caller's, as ``torch.set_default_device("cuda")`` sets, changes no call."""

from __future__ import annotations

import pytest
import torch

import attention_dispatch as ad
from attention_dispatch import registry
from attention_dispatch.testing import build, conformance_cases, predicted_codes

pytestmark = pytest.mark.usefixtures("one_thread")


def run(name, case):
    inputs = build(case, "cpu")
    if predicted_codes(registry.get(name), case, inputs):
        return None

    def attend():
        tensors = inputs.query, inputs.key, inputs.value
        with torch.autocast("cpu", dtype=case.autocast, enabled=case.autocast is not None):
            result = ad.dispatch_attention_fn(*tensors, inputs.mask.argument, backend=name, **case.arguments)
        results = list(result) if isinstance(result, tuple) else [result]
        if case.grad:
            results += torch.autograd.grad(results[0].sum(), [tensor for tensor in tensors if tensor.requires_grad])
        return results

    return attend


@pytest.mark.parametrize("name", ["native", "_native_flash", "_native_math", "flex", "reference"])
def test_calls_are_what_they_are_without(name):
    computed = 0
    for case in conformance_cases("cpu"):
        attend = run(name, case)
        if attend is None or case.dropout_p or (name == "flex" and not case.core):
            continue
        expected = attend()
        registry.forget_status(name)
        # A tensor made without a device would be a meta tensor here, and fail or spoil the result.
        with torch.device("meta"):
            actual = attend()
        computed += 1
        for one, other in zip(actual, expected, strict=True):
            assert torch.equal(one, other), case.name
    assert computed > (4 if name == "flex" else 50)


def test_a_model_is_tuned_and_checked_under_it(monkeypatch):
    query, key, value = (torch.randn(1, 32, 2, 16) for _ in range(3))
    expected = ad.dispatch_attention_fn(query, key, value)
    with torch.device("meta"), ad.tuning(save=False, budget_s=0.001) as tuned:
        assert torch.equal(ad.dispatch_attention_fn(query, key, value), expected)
    assert len(tuned.measurements) == 1
    monkeypatch.setenv("ATTENTION_DISPATCH_CHECKS", "numerics")
    with torch.device("meta"):
        assert torch.equal(ad.dispatch_attention_fn(query, key, value), expected)
