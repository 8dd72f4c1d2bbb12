"""Models that do not know this library: routed where they call attention, exactly as before after a reset."""

import copy
import gc
import inspect
import threading

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import attention_dispatch as ad
from attention_dispatch.errors import InvalidCallError

from . import blocks
from .blocks import DIM, HEADS, Block, VisionTransformer


@pytest.mark.parametrize(
    "attention",
    [blocks.ByAttribute, blocks.ByImport, blocks.ByAlias, blocks.ByFunction, blocks.ByObject, blocks.OverridesMethod],
)
def test_every_way_to_call_the_function_is_routed_and_restored(attention, probe):
    model, x = Block(attention).eval(), torch.randn(2, 5, DIM)
    plain = model(x)
    report = ad.set_attention_backend(model, "probe_a")
    assert report.routed == (("attn", "'probe_a'"),) and not report.left
    torch.testing.assert_close(model(x), plain)
    assert probe.taken() == 1
    ad.reset_attention_backend(model)
    assert torch.equal(model(x), plain)
    assert probe.taken() == 0
    assert "_attention_dispatch_scope" not in vars(model.attn) and not model.attn._forward_hooks
    assert blocks.scaled_dot_product_attention is blocks.sdpa is F.scaled_dot_product_attention


def test_a_timm_style_vit(probe):
    model, images = VisionTransformer().eval(), torch.randn(2, 3, 16, 16)
    plain = model(images)
    assert len(ad.set_attention_backend(model, "probe_a").routed) == 3
    torch.testing.assert_close(model(images), plain)
    assert probe.taken() == 3
    model(images).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    ad.reset_attention_backend(model)


def test_what_cannot_be_reached_is_reported():
    model = nn.ModuleDict({"kept": blocks.KeepsFunction(), "hand": blocks.HandWrittenAttention(), "ok": Block()})
    report = ad.set_attention_backend(model, "native")
    assert report.routed == (("ok.attn", "'native'"),)
    left = dict(report.left)
    assert "'function'" in left["kept"] and "dispatch_attention_fn" in left["hand"]
    ad.reset_attention_backend(model)
    with pytest.raises(InvalidCallError, match="'function'"):
        ad.set_attention_backend(model["kept"], "native")
    with pytest.raises(InvalidCallError, match="nothing to route"):
        ad.set_attention_backend(nn.Linear(2, 2), "native")
    with pytest.raises(InvalidCallError, match=r"torch.nn.Module"):
        ad.set_attention_backend("model", "native")


@pytest.mark.parametrize("fused", [True, False])
def test_multihead_attention(fused, probe):
    model, x = nn.MultiheadAttention(DIM, HEADS, batch_first=True).eval(), torch.randn(2, 5, DIM)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.set_grad_enabled(not fused):
        plain = [model(x, x, x, need_weights=False)[0], model(x, x, x, key_padding_mask=padding, need_weights=False)[0]]
        ad.set_attention_backend(model, "probe_a")
        torch.testing.assert_close(model(x, x, x, need_weights=False)[0], plain[0])
        torch.testing.assert_close(model(query=x, key=x, value=x, need_weights=False)[0], plain[0])
        torch.testing.assert_close(model(x, x, x, key_padding_mask=padding, need_weights=False)[0], plain[1])
        assert probe.taken() == 3
    ad.reset_attention_backend(model)


def test_multihead_attention_that_wants_weights_is_refused_or_left_to_torch():
    model, x = nn.MultiheadAttention(DIM, HEADS, batch_first=True).eval(), torch.randn(2, 5, DIM)
    plain, weights = model(x, x, x)
    ad.set_attention_backend(model, "native")
    with pytest.raises(InvalidCallError, match="need_weights=False"):
        model(x, x, x)
    ad.set_attention_backend(model, "auto")
    again, weights_again = model(x, x, x)
    torch.testing.assert_close(again, plain)
    torch.testing.assert_close(weights_again, weights)
    ad.reset_attention_backend(model)


@pytest.mark.parametrize("norm_first", [False, True])
def test_encoder_layers_leave_their_fused_path(norm_first, probe):
    layer = nn.TransformerEncoderLayer(DIM, HEADS, 64, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first).eval()
    x = torch.randn(2, 5, DIM)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    causal = nn.Transformer.generate_square_subsequent_mask(5)
    with torch.no_grad():
        plain = [model(x), model(x, src_key_padding_mask=padding), model(x, mask=causal, is_causal=True)]
        report = ad.set_attention_backend(model, "probe_a")
        assert [name for name, _ in report.routed] == ["layers.0.self_attn", "layers.1.self_attn"]
        torch.testing.assert_close(model(x), plain[0])
        routed = model(x, src_key_padding_mask=padding)
        torch.testing.assert_close(routed[~padding], plain[1][~padding])
        torch.testing.assert_close(model(x, mask=causal, is_causal=True), plain[2])
        assert probe.taken() == 6
        ad.reset_attention_backend(model)
        assert torch.equal(model(x, src_key_padding_mask=padding), plain[1])
        assert probe.taken() == 0
    assert model.use_nested_tensor is not norm_first


def test_decoder_layers_have_both_roles(probes):
    model = nn.TransformerDecoderLayer(DIM, HEADS, 64, batch_first=True).eval()
    ad.set_attention_backend(model, ad.policies.roles(self="probe_a", cross="probe_b"))
    model(torch.randn(2, 5, DIM), torch.randn(2, 5, DIM))
    assert [probe.taken() for probe in probes] == [1, 1]
    ad.reset_attention_backend(model)


def test_other_models_and_other_threads_are_not_routed(probe):
    routed, other, x = Block().eval(), Block().eval(), torch.randn(2, 5, DIM)
    ad.set_attention_backend(routed, "probe_a")
    other(x)
    assert probe.taken() == 0

    inside, outside = threading.Event(), threading.Event()

    def wait(module, args):
        inside.set()
        outside.wait(10)

    routed.attn.proj.register_forward_pre_hook(wait)
    thread = threading.Thread(target=routed, args=(x,))
    thread.start()
    assert inside.wait(10)
    other(x)  # while the other thread is inside a routed forward
    outside.set()
    thread.join()
    assert len(probe.calls) == 1
    ad.reset_attention_backend(routed)


def test_state_is_restored_after_exceptions(probe):
    model, x = Block().eval(), torch.randn(2, 5, DIM)
    ad.set_attention_backend(model, "probe_a")
    handle = model.attn.register_forward_pre_hook(lambda module, args: 1 / 0, prepend=True)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            model(x)
    handle.remove()
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 5, DIM + 1))
    with pytest.raises(ValueError, match="not enough values"):
        model.attn(torch.randn(DIM))
    q = torch.randn(1, 2, 3, 4)
    F.scaled_dot_product_attention(q, q, q)
    assert probe.taken() == 0
    model(x)
    assert probe.taken() == 1
    ad.reset_attention_backend(model)


def test_torch_has_its_function_back_when_routed_models_are_gone():
    before = F.scaled_dot_product_attention
    model = Block()
    ad.set_attention_backend(model, "native")
    assert F.scaled_dot_product_attention is not before
    model(torch.randn(1, 4, DIM))
    twin = copy.deepcopy(model)
    gc.disable()  # counting references is enough
    try:
        del model
        assert F.scaled_dot_product_attention is not before
        del twin
        assert F.scaled_dot_product_attention is before and blocks.sdpa is before
    finally:
        gc.enable()


def test_a_routed_module_has_the_signature_of_its_forward():
    model = blocks.Pair()
    expected = inspect.signature(model.forward)
    ad.set_attention_backend(model, "native")
    assert inspect.signature(model.forward) == expected and len(expected.parameters) == 2
    ad.reset_attention_backend(model)


def test_another_model_can_be_scripted_and_traced_by_fx_meanwhile():
    routed, x = Block(), torch.randn(1, 2, 3, 4)
    ad.set_attention_backend(routed, "native")

    def other(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(x, x, x)

    torch.testing.assert_close(torch.jit.script(other)(x), other(x))
    torch.testing.assert_close(torch.fx.symbolic_trace(other)(x), other(x))
    multihead, sequence = nn.MultiheadAttention(DIM, HEADS), torch.randn(5, 2, DIM)
    scripted = torch.jit.script(multihead)
    torch.testing.assert_close(scripted(sequence, sequence, sequence), multihead(sequence, sequence, sequence))
    ad.reset_attention_backend(routed)


def test_torch_has_both_of_its_functions_back_after_a_reset(probe):
    names = ("scaled_dot_product_attention", "multi_head_attention_forward")
    before = [getattr(F, name) for name in names]
    model, x = nn.MultiheadAttention(DIM, HEADS), torch.randn(5, 2, DIM)
    ad.set_attention_backend(model, "probe_a")
    assert not any(getattr(F, name) is function for name, function in zip(names, before))
    model(x, x, x, need_weights=False)
    assert probe.taken() == 1
    ad.reset_attention_backend(model)
    assert all(getattr(F, name) is function for name, function in zip(names, before))


@pytest.mark.parametrize(
    ("query", "key", "mask"),
    [
        ((5, 8), (7, 8), (5, 7)),
        ((3, 5, 8), (3, 7, 8), (3, 5, 7)),
        ((3, 5, 8), (1, 7, 8), None),
        ((2, 3, 5, 8), (2, 3, 7, 8), (7,)),
        ((2, 3, 5, 8), (2, 3, 7, 8), (3, 1, 7)),
        ((2, 3, 5, 8), (1, 3, 7, 8), (5, 7)),
        ((2, 3, 5, 8), (2, 1, 7, 8), None),
        ((2, 2, 3, 5, 8), (2, 2, 3, 7, 8), (2, 1, 1, 5, 7)),
    ],
)
def test_shapes_mean_what_they_mean_to_torch(query, key, mask, probe):
    class Raw(nn.Module):
        def forward(self, q, k, v, mask):
            return F.scaled_dot_product_attention(q, k, v, mask)

    torch.manual_seed(1)
    q, k, v = (torch.randn(shape, dtype=torch.float64) for shape in (query, key, key))
    mask = None if mask is None else torch.rand(mask) > 0.4
    model = Raw()
    if mask is not None and mask.ndim == 1:
        mask = mask[None]
    plain = model(q, k, v, mask)
    ad.set_attention_backend(model, "probe_a")
    torch.testing.assert_close(model(q, k, v, mask), plain)
    assert probe.taken() == 1
    ad.reset_attention_backend(model)


def test_nested_tensors_are_refused():
    class Raw(nn.Module):
        def forward(self, q):
            return F.scaled_dot_product_attention(q, q, q)

    model = Raw()
    nested = torch.nested.nested_tensor([torch.randn(2, 3, 4), torch.randn(2, 5, 4)])
    ad.set_attention_backend(model, "native")
    with pytest.raises(InvalidCallError, match="exclude"):
        model(nested)
    ad.reset_attention_backend(model)


def test_a_module_left_out_inside_a_routed_one_stays_out(probe):
    model, x = blocks.ExtraTail().eval(), torch.randn(2, 5, DIM)
    report = ad.set_attention_backend(model, "probe_a", exclude="inner")
    assert report.routed == (("", "'probe_a'"),) and dict(report.left)["inner"] == "in exclude"
    model(x)
    assert probe.taken() == 1
    ad.set_attention_backend(model, "probe_a")
    model(x)
    assert probe.taken() == 2
    ad.reset_attention_backend(model)
    model(x)
    assert probe.taken() == 0
