"""Routed models under torch.compile(fullgraph=True) and torch.export."""

import pytest
import torch
import torch.nn as nn
from torch._dynamo.testing import CompileCounter

import attention_dispatch as ad
from attention_dispatch import policies
from attention_dispatch.backends.reference import CAPABILITIES, attention
from attention_dispatch.call import AttentionOutput
from attention_dispatch.registry import Backend, register_backend, unregister_backend
from attention_dispatch.request import current

from .blocks import DIM, HEADS, Block, CrossModel, VisionTransformer

FACTORS = {"times_2": 2.0, "times_3": 3.0}


@pytest.fixture(autouse=True)
def _factors():
    """Backends whose results differ, so that a stale choice shows."""

    def scaled(factor):
        return lambda call: AttentionOutput(attention(call).out * factor)

    for name, factor in FACTORS.items():
        register_backend(Backend(name=name, family="test", capabilities=(CAPABILITIES,), forward=scaled(factor)))
    yield
    for name in FACTORS:
        unregister_backend(name)


def compiled(model):
    counter = CompileCounter()
    return torch.compile(model, fullgraph=True, backend=counter), counter


@pytest.mark.parametrize("request_", ["native", "times_2", ["times_3", "native"], "auto"])
def test_fullgraph(request_):
    model, images = VisionTransformer().eval(), torch.randn(2, 3, 16, 16)
    ad.set_attention_backend(model, request_)
    expected = model(images)
    torch._dynamo.reset()
    run, counter = compiled(model)
    torch.testing.assert_close(run(images), expected)
    run(images)
    assert counter.frame_count == 1
    assert current.model is None and not current.stack
    ad.reset_attention_backend(model)


@pytest.mark.parametrize("another_is_routed", [False, True])
def test_changes_after_compiling_are_honoured(another_is_routed):
    model, x, another = Block().eval(), torch.randn(2, 5, DIM), Block()
    plain = model(x)
    if another_is_routed:
        ad.set_attention_backend(another, "native")
    run, _ = compiled(model)
    torch.testing.assert_close(run(x), plain)
    for name in ("times_2", "times_3", "times_2"):
        ad.set_attention_backend(model, name)
        expected = model(x)
        assert (expected - plain).abs().max() > 1e-3
        torch.testing.assert_close(run(x), expected)
    ad.reset_attention_backend(model)
    torch.testing.assert_close(run(x), plain)
    ad.reset_attention_backend(another)


def test_multihead_attention_and_encoder_layers():
    model = nn.TransformerEncoderLayer(DIM, HEADS, 64, batch_first=True).eval()
    x, padding = torch.randn(2, 5, DIM), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    ad.set_attention_backend(model, "times_2")
    with torch.no_grad():
        expected = model(x, src_key_padding_mask=padding)
        run, counter = compiled(model)
        torch.testing.assert_close(run(x, src_key_padding_mask=padding), expected)
    assert counter.frame_count == 1
    ad.reset_attention_backend(model)


def test_a_step_policy_compiles_once_per_request_not_per_step():
    model, x = Block().eval(), torch.randn(2, 5, DIM)
    policy = policies.steps({"0:2": "times_2", "2:-2": "times_3", "-2:": "times_2"}, total=10)
    ad.set_attention_backend(model, policy)
    run, counter = compiled(model)
    results = []
    for step in range(10):
        with policies.at_step(step):
            results.append((run(x), model(x)))
    assert counter.frame_count == 2
    for step, (fast, slow) in enumerate(results):
        torch.testing.assert_close(fast, slow)
        torch.testing.assert_close(fast, results[0 if step < 2 or step >= 8 else 2][0])
    assert (results[0][0] - results[2][0]).abs().max() > 1e-3
    ad.reset_attention_backend(model)


def test_roles_told_by_lengths_compile():
    model, x, context = CrossModel().eval(), torch.randn(2, 5, DIM), torch.randn(2, 7, DIM)
    ad.set_attention_backend(model, policies.roles(self="times_2", cross="times_3"))
    expected = model(x, context)
    run, counter = compiled(model)
    torch.testing.assert_close(run(x, context), expected)
    assert counter.frame_count == 1
    ad.reset_attention_backend(model)


def test_another_compiled_model_is_compiled_again_at_most_once():
    other, x, routed = Block().eval(), torch.randn(2, 5, DIM), Block().eval()
    run, counter = compiled(other)
    plain = run(x)
    for _ in range(2):
        ad.set_attention_backend(routed, "times_2")
        assert torch.equal(run(x), plain)
        ad.reset_attention_backend(routed)
        assert torch.equal(run(x), plain)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("strict", [False, True])
def test_export_bakes_the_choice_in(strict):
    model, x = Block().eval(), torch.randn(2, 5, DIM)
    ad.set_attention_backend(model, "times_2")
    expected = model(x)
    program = torch.export.export(model, (x,), strict=strict)
    ad.reset_attention_backend(model)
    torch.testing.assert_close(program.module()(x), expected)
    assert current.model is None and not current.stack


def test_export_of_native_is_one_operator_per_attention():
    model, x = Block().eval(), torch.randn(2, 5, DIM)
    ad.set_attention_backend(model, "native")
    program = torch.export.export(model, (x,))
    operators = [str(node.target) for node in program.graph.nodes]
    assert operators.count("aten.scaled_dot_product_attention.default") == 1
    ad.reset_attention_backend(model)
