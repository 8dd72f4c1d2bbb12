"""Findings 2.C about diffusers' dispatcher (settings that leak, that outlive a reset, or that other threads see), each by
name; and two that come from how diffusers finds attention calls."""

from __future__ import annotations

import threading
import warnings

import diffusers
import diffusers.models.attention_dispatch as upstream
import pytest
import torch
from diffusers.hooks import HookRegistry
from diffusers.hooks.layer_skip import AttentionProcessorSkipHook
from diffusers.models.attention_dispatch import attention_backend
from torch.utils._python_dispatch import TorchDispatchMode

import attention_dispatch as ad
from attention_dispatch import registry, settings
from attention_dispatch.integrations import diffusers as integration

from .models import (
    any_flow_transformer,
    flux_transformer,
    forward,
    qwen_transformer,
    sd3_transformer,
    unet,
    wan_transformer,
)

ANY = {"flux": flux_transformer, "sd3": sd3_transformer, "unet": unet, "wan": wan_transformer}


@pytest.mark.parametrize("model", ANY)
def test_2C_model_setting_does_not_leak_to_other_models(model, spy, ran):
    first, inputs = ANY[model]()
    second, _ = ANY[model]()
    first.set_attention_backend("spy")
    forward(second, inputs)
    assert not spy
    assert set(ran) == {"native"}
    assert upstream._AttentionBackendRegistry._active_backend is upstream.AttentionBackendName.NATIVE


@pytest.mark.parametrize("model", ANY)
def test_2C_reset_ends_the_setting(model, spy):
    routed, inputs = ANY[model]()
    routed.set_attention_backend("spy")
    forward(routed, inputs)
    assert spy
    spy.clear()
    routed.reset_attention_backend()
    forward(routed, inputs)
    assert not spy


@pytest.mark.parametrize("model", ["sd3", "unet"])
def test_2C_models_outside_the_dispatcher_are_routed(model, spy):
    routed, inputs = ANY[model]()
    report = routed.set_attention_backend("spy")
    forward(routed, inputs)
    assert len(spy) == len(report.routed) > 0


def test_2C_a_model_without_attention_is_an_error():
    model = diffusers.AutoencoderTiny(encoder_block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8))
    with pytest.raises(ad.InvalidCallError, match="nothing to route"):
        model.set_attention_backend("reference")


def test_2C_scope_is_not_seen_by_other_threads(spy):
    model, inputs = flux_transformer()
    inside, done = threading.Event(), threading.Event()

    def enter():
        with attention_backend("spy"):
            inside.set()
            assert done.wait(30)

    thread = threading.Thread(target=enter)
    thread.start()
    assert inside.wait(30)
    forward(model, inputs)
    with attention_backend("reference"):
        done.set()
        thread.join()
        forward(model, inputs)
    forward(model, inputs)
    assert not spy


@pytest.mark.parametrize("backend", ["_native_math", "_native_flash"])
def test_2C_native_backends_do_not_switch_kernels_of_the_process(backend):
    model, inputs = flux_transformer()
    flags = (
        torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.mem_efficient_sdp_enabled,
        torch.backends.cuda.math_sdp_enabled, torch.backends.cuda.cudnn_sdp_enabled,
    )  # fmt: skip
    before = [flag() for flag in flags]
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append([flag() for flag in flags])
            return func(*args, **(kwargs or {}))

    if backend == "_native_flash":
        model, inputs = model.to(torch.bfloat16), {
            name: value.to(torch.bfloat16) if isinstance(value, torch.Tensor) else value
            for name, value in inputs.items()
        }  # fmt: skip
        if not ad.explain(*[torch.empty(1, 23, 2, 64, dtype=torch.bfloat16)] * 3, backend=backend).backend:
            pytest.skip("_native_flash does not run here")
    model.set_attention_backend(backend)
    with Watch():
        forward(model, inputs)
    assert seen
    assert all(flags_then == before for flags_then in seen)


def test_2C_the_models_setting_wins_over_the_scope_as_documented(spy, ran):
    model, inputs = flux_transformer()
    model.set_attention_backend("spy")
    with attention_backend("reference"):
        forward(model, inputs)
    assert set(ran) == {"spy"}


@pytest.mark.parametrize("switch", ["set_use_npu_flash_attention", "set_use_xla_flash_attention"])
def test_2C_switching_npu_or_xla_off_does_not_switch_it_on(switch):
    model, inputs = flux_transformer()
    attention = model.transformer_blocks[0].attn
    getattr(attention, switch)(False)
    assert attention.processor._attention_backend is None
    attention.processor._attention_backend = "flex"
    getattr(attention, switch)(False)
    assert attention.processor._attention_backend == "flex"
    forward(model, inputs)


def test_2C_switching_xformers_off_ends_it(monkeypatch):
    monkeypatch.setitem(registry._states, "xformers", registry.Status("xformers", True, ()))
    model, inputs = flux_transformer()
    attention = model.transformer_blocks[0].attn
    model.set_attention_backend("xformers")
    model.disable_xformers_memory_efficient_attention()
    assert attention.processor._attention_backend is None
    attention.set_attention_backend("reference")
    model.disable_xformers_memory_efficient_attention()
    assert attention.processor._attention_backend == "reference"
    forward(model, inputs)


def test_2C_reset_restores_class_defaults():
    model, inputs = any_flow_transformer()
    expected = forward(model, inputs)
    report = model.set_attention_backend("flex")
    assert any("attn1" in name for name, _ in report.routed)
    model.reset_attention_backend()
    assert model.blocks[0].attn1.processor._attention_backend == "flex"
    assert "_attention_backend" not in vars(model.blocks[0].attn1.processor)
    torch.testing.assert_close(forward(model, inputs), expected)


def test_2C_a_setting_for_the_model_leaves_processors_that_refuse_it():
    model, inputs = any_flow_transformer()
    expected = forward(model, inputs)
    report = model.set_attention_backend("reference")
    assert dict(report.left) == {"blocks.0.attn1": "accepts only 'flex'"}
    assert [name for name, _ in report.routed] == ["blocks.0.attn2"]
    torch.testing.assert_close(forward(model, inputs), expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(ad.InvalidCallError, match="accepts only 'flex'"):
        model.blocks[0].attn1.set_attention_backend("reference")


def test_2C_pinned_processor_is_pinned_again_after_a_reset():
    model, _ = flux_transformer()
    processor = model.transformer_blocks[0].attn.processor
    processor._attention_backend = "flex"
    model.set_attention_backend("reference")
    model.reset_attention_backend()
    assert processor._attention_backend == "flex"


@pytest.mark.parametrize("backend", ["native", "_native_math", "reference"])
def test_2C_inference_mode_does_not_poison_later_training(backend):
    model, inputs = qwen_transformer()
    model.set_attention_backend(backend)
    with torch.inference_mode():
        model(**inputs)
    model.train()
    model(**inputs)[0].square().mean().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.transformer_blocks[0].attn.to_q.parameters())


def test_2C_checks_say_nothing_about_defaults(caplog):
    model, inputs = flux_transformer()
    model.set_attention_backend("flex")
    settings.set_checks(True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*flex_attention called without torch.compile.*")
        forward(model, inputs)
    assert "Removing unsupported" not in caplog.text


def test_2C_diffusers_switch_for_checks_is_honoured():
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry, dispatch_attention_fn

    query = torch.randn(1, 4, 2, 16)
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    dispatch_attention_fn(query, query, query, attn_mask=mask, is_causal=True)
    _AttentionBackendRegistry._checks_enabled = True
    assert _AttentionBackendRegistry._checks_enabled
    with pytest.raises(ad.InvalidCallError, match="is_causal"):
        dispatch_attention_fn(query, query, query, attn_mask=mask, is_causal=True)


def test_2C_attention_modules_take_the_same_names_as_models(ran):
    model, inputs = flux_transformer()
    attention = model.transformer_blocks[0].attn
    attention.set_attention_backend("REFERENCE")
    forward(model, inputs)
    assert ran == {"reference": 1, "native": 1}


def test_2C_a_backend_that_cannot_run_is_refused_when_it_is_set():
    model, _ = flux_transformer()
    attention = model.transformer_blocks[0].attn
    for owner in (model, attention):
        with pytest.raises(ad.BackendUnavailableError, match=r"(?s)xformers.*Why:.*Do:"):
            owner.set_attention_backend("xformers")
    assert "_attention_backend" not in vars(attention.processor)


def test_a_demand_that_cannot_run_the_call_says_why_and_what_to_do():
    model, inputs = flux_transformer()
    model.set_attention_backend("flex")
    with pytest.raises(ad.BackendRejectedError, match=r"(?s)'flex'.*gradients are needed.*Do:.*no_grad"):
        model(**inputs)  # FlexAttention is forward-only on CPU
    model.set_attention_backend(["flex", "reference"])
    assert model(**inputs)[0].requires_grad


@pytest.mark.parametrize("model", ["flux", "wan", "unet"])
@pytest.mark.parametrize("backend", ["reference", "flex", "native"])
def test_perturbed_attention_guidance_reaches_routed_backends(model, backend):
    """diffusers skips attention scores by watching for torch's function, which other backends do not call."""
    plain, inputs = _with_skipped_scores(*ANY[model]())
    integration.deactivate()
    expected = forward(plain, inputs)
    integration.activate()
    unskipped = forward(*ANY[model]())
    assert (expected - unskipped).abs().max() > 1e-3
    routed, inputs = _with_skipped_scores(*ANY[model]())
    routed.set_attention_backend(backend)
    torch.testing.assert_close(forward(routed, inputs), expected, atol=1e-5, rtol=1e-5)
    routed.reset_attention_backend()
    with attention_backend(backend):
        torch.testing.assert_close(forward(routed, inputs), expected, atol=1e-5, rtol=1e-5)


def test_skipped_scores_of_an_unrouted_model_while_another_is_routed():
    other, _ = sd3_transformer()
    plain, inputs = _with_skipped_scores(*unet())
    expected = forward(plain, inputs)
    other.set_attention_backend("reference")
    torch.testing.assert_close(forward(plain, inputs), expected)


def _with_skipped_scores(model, inputs):
    """As LayerSkipConfig(skip_attention_scores=True) does, which in 0.42.1 fails to set up some of these models."""
    for name, module in model.named_modules():
        if name.endswith((".attn", ".attn1")):
            hook = AttentionProcessorSkipHook(None, skip_attention_scores=True)
            HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, "skip")
    return model, inputs
