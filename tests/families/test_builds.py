"""FlashAttention 3 is often built without some of its parts; what a build left out is refused by name."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from family_rows import ROWS

from attention_dispatch import BackendRejectedError, dispatch_attention_fn, registry

FIRST = dict(reversed(ROWS))
FLAG = "FLASHATTENTION_DISABLE_"


@pytest.fixture
def built_without(monkeypatch):
    def build(*names: str) -> None:
        config = ModuleType("flash_attn_config")
        every = ("BACKWARD", "FP16", "SOFTCAP", "LOCAL", "VARLEN", *(f"HDIM{d}" for d in (64, 96, 128, 192, 256)))
        config.CONFIG = {"build_flags": {FLAG + name: name in names for name in every}}
        monkeypatch.setitem(sys.modules, "flash_attn_config", config)

    return build


def tensors(head_dim=64, dtype=torch.bfloat16, requires_grad=False):
    return [torch.randn(1, 8, 2, head_dim, dtype=dtype, requires_grad=requires_grad) for _ in range(3)]


CALLS = {
    "BACKWARD": ("grad", {"requires_grad": True}, {}),
    "FP16": ("dtype", {"dtype": torch.float16}, {}),
    "SOFTCAP": ("softcap", {}, {"softcap": 5.0}),
    "LOCAL": ("window", {}, {"window_size": (2, 0)}),
    "HDIM256": ("head_dim", {"head_dim": 200}, {}),
}


@pytest.mark.parametrize("name", CALLS)
def test_what_a_build_left_out_is_refused_with_the_switch_to_undo(name, on_cpu, built_without):
    on_cpu("_flash_3", FIRST["_flash_3"])
    code, of_tensors, arguments = CALLS[name]
    query, key, value = tensors(**of_tensors)
    built_without()
    dispatch_attention_fn(query, key, value, backend="_flash_3", attention_kwargs=arguments)
    built_without(name)
    registry.forget_status("_flash_3")
    with pytest.raises(BackendRejectedError) as caught:
        dispatch_attention_fn(query, key, value, backend="_flash_3", attention_kwargs=arguments)
    assert caught.value.codes == (code,)
    assert FLAG + name in str(caught.value)


def test_a_head_dim_that_was_left_out_runs_as_the_next_larger_one(on_cpu, built_without):
    on_cpu("_flash_3", FIRST["_flash_3"])
    built_without("HDIM96", "HDIM192", "HDIM256")
    query, key, value = tensors(head_dim=96)
    assert dispatch_attention_fn(query, key, value, backend="_flash_3").shape == query.shape


def test_packed_sequences_need_a_build_with_them(on_cpu, built_without):
    on_cpu("_flash_varlen_3", FIRST["_flash_varlen_3"])
    built_without("VARLEN")
    with pytest.raises(BackendRejectedError, match="packed sequences"):
        dispatch_attention_fn(*tensors(), backend="_flash_varlen_3")


def test_the_switches_of_a_package_say_nothing_of_a_hub_build(on_cpu, built_without):
    on_cpu("_flash_3_hub", FIRST["_flash_3_hub"])
    built_without("BACKWARD")
    query, key, value = tensors(requires_grad=True)
    dispatch_attention_fn(query, key, value, backend="_flash_3_hub").sum().backward()
    assert query.grad is not None and query.grad.abs().max() > 0


def test_gradients_are_refused_after_calls_without_as_before_them(on_cpu, built_without):
    on_cpu("_flash_3", FIRST["_flash_3"])
    built_without("BACKWARD")
    registry.forget_status("_flash_3")
    query, key, value = tensors()
    for _ in range(3):
        dispatch_attention_fn(query, key, value, backend="_flash_3")
    with pytest.raises(BackendRejectedError, match="BACKWARD"):
        dispatch_attention_fn(query, key, value.requires_grad_(), backend="_flash_3")
