"""What would have to change for another backend to run, with ratios where they were measured."""

from __future__ import annotations

import json

import pytest
import torch

import attention_dispatch as ad
from attention_dispatch import decision
from attention_dispatch.call import canonicalise, spec_of
from attention_dispatch.resolve import extent_of
from attention_dispatch.tuning import store

from .entries import entry


@pytest.fixture
def tensors():
    return [torch.randn(1, 32, 2, 16) for _ in range(3)]


def test_excluded_by_deterministic(tensors):
    tensors[0].requires_grad_()
    found = ad.explain(*tensors, attention_kwargs={"deterministic": True}, backend="auto")
    assert "'native' is excluded by your deterministic=True" in str(found)
    assert found.backend == "_native_flash"


def test_the_change_that_would_let_a_backend_run_is_named(tensors):
    found = ad.explain(*tensors, dropout_p=0.1, backend="auto")
    changes = {item.backend: item for item in found.counterfactuals}
    assert changes["_native_flash"].code == "dropout" and "dropout_p were 0" in str(changes["_native_flash"])
    assert json.loads(found.to_json())["counterfactuals"][0]["backend"]


def test_a_ratio_needs_both_measurements(tensors):
    call = canonicalise(*tensors, dropout_p=0.1)
    now = spec_of(call)
    store.add("cpu", {store.key(now, extent_of(call)): entry(native=30.0)})
    ratio = {item.backend: item.ratio for item in ad.explain(*tensors, dropout_p=0.1, backend="auto").counterfactuals}
    assert ratio["_native_flash"] is None
    then = now._replace(dropout=False)
    store.add("cpu", {store.key(then, extent_of(call)): entry(native=20.0, _native_flash=10.0)})
    found = ad.explain(*tensors, dropout_p=0.1, backend="auto")
    assert "'_native_flash' would run 3 x as fast as the choice (measured on this machine) if dropout_p were 0" in str(
        found
    )


def test_published_rates_are_compared_only_for_what_they_measured(tensors):
    spec = spec_of(canonicalise(*[tensor.bfloat16() for tensor in tensors]))
    spec = spec._replace(device="cuda", architecture="sm_90", head_dim=128, head_dim_v=128)
    ratio, source = decision._ratio("native", spec, "_flash_3", spec, store.Extent(1, 16384, 16384))
    assert ratio == pytest.approx(748 / 649) and "H100" in source
    masked = spec._replace(mask="bool")
    assert decision._ratio("native", masked, "_flash_3", spec, store.Extent(1, 16384, 16384)) == (None, "")


def test_a_call_that_nothing_excludes_has_no_counterfactual_on_its_device(tensors):
    assert [item for item in ad.explain(*tensors).counterfactuals if item.backend == "_native_flash"] == []


def test_copies_are_listed_with_their_bytes(tensors):
    found = ad.explain(*tensors, attention_kwargs={"window_size": (4, 4)}, backend="native")
    assert [(copy.adapter, copy.bytes) for copy in found.copies] == [("dense_mask", 32 * 32)]
    assert "aten" in found.kernel
    padding = torch.arange(32) < 20
    found = ad.explain(*tensors, padding[None], backend="_native_flash")
    assert [(copy.adapter, copy.bytes) for copy in found.copies] == [("additive_mask", 32 * 4)]


def test_those_asked_for_come_first_and_equal_reasons_are_told_once():
    tensors = [torch.randn(1, 32, 2, 64) for _ in range(3)]
    text = str(ad.explain(*tensors, backend=["triton_sage", "flash", "native"]))
    [line] = [line for line in text.splitlines() if line.startswith("Not flash, triton_sage")]
    assert text.count("it runs on cuda, not on cpu") == 1 and text.index(line) > text.index("Backend:  native")
    assert "Order:" not in text and "Order:" in str(ad.explain(*tensors, backend="auto"))
