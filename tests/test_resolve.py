"""What is decided about a call, where no GPU is needed to show it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from attention_dispatch import dispatch_attention_fn, explain, preference, registry, resolve
from attention_dispatch.call import canonicalise, spec_of
from attention_dispatch.request import parse

X = torch.randn(1, 6, 2, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kernel", ["aten MATH", "aten FLASH_ATTENTION"])
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_math_on_a_gpu_is_warned_of_once_where_a_fused_kernel_could_run(kernel, device, monkeypatch, recwarn):
    """As if the call were on a GPU on which torch takes ``kernel``, and "fused" were installed."""
    call = canonicalise(X, X, X)
    spec = spec_of(call)._replace(device=device)
    native = replace(registry.get("native"), kernel=lambda call: kernel)
    fused = replace(native, name="fused")
    registry.register_backend(native, replace=True)
    registry.register_backend(fused)
    monkeypatch.setattr(preference, "order", lambda *_: ("native", "_native_math", "reference", "fused"))
    try:
        for _ in range(3):
            resolve.plan_for(parse("native"), spec, call)
    finally:
        registry.unregister_backend("fused")
        registry._rows["native"] = registry.Row("attention_dispatch.backends.native:NATIVE")
        registry.forget_status("native")
    said = [str(warning.message) for warning in recwarn if "MATH" in str(warning.message)]
    expected = kernel == "aten MATH" and device == "cuda"
    assert len(said) == expected
    assert all("backend='fused' runs it fused" in text for text in said)


def test_explain_names_the_aten_kernel_that_torch_takes():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        dispatch_attention_fn(X, X, X, is_causal=True)
    seen = {event.key for event in profile.key_averages()}
    assert explain(X, X, X, is_causal=True).kernel == "aten FLASH_ATTENTION"
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in seen
    wide = torch.randn(1, 6, 2, 4)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        dispatch_attention_fn(X, X, wide)
    assert explain(X, X, wide).kernel == "aten MATH"
    assert "aten::_scaled_dot_product_attention_math" in {event.key for event in profile.key_averages()}
