"""Routed models under torch.compile: whole graphs, settings that change between calls, and repeated blocks."""

from __future__ import annotations

import pytest
import torch
from diffusers.hooks import HookRegistry
from diffusers.hooks.layer_skip import AttentionProcessorSkipHook
from diffusers.models.attention_dispatch import attention_backend

from attention_dispatch.integrations import diffusers as integration
from attention_dispatch.request import current

from .models import flux_transformer, forward, qwen_transformer, sd3_transformer, unet

MODELS = {"flux": flux_transformer, "qwen": qwen_transformer, "sd3": sd3_transformer, "unet": unet}


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_a_compiled_model_on_flex_leaves_no_setting():
    model, inputs = sd3_transformer()
    model.set_attention_backend("flex")
    forward(torch.compile(model, fullgraph=True, backend="eager"), inputs)
    assert (current.model, current.stack, current.effective) == (None, [], None)


def graph_of_calls(model):
    """Compile to one graph; the list gets the names of the operators of each graph that is compiled."""
    graphs = []

    def backend(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph

    return torch.compile(model, fullgraph=True, backend=backend), graphs


@pytest.mark.parametrize(
    ("model", "backend"),
    [(model, backend) for model in MODELS for backend in ("native", "flex")] + [("sd3", "reference")],
)
def test_fullgraph_equals_plain_diffusers(model, backend):
    integration.deactivate()
    expected = forward(*MODELS[model]())
    integration.activate()
    routed, inputs = MODELS[model]()
    routed.set_attention_backend(backend)
    compiled, graphs = graph_of_calls(routed)
    torch.testing.assert_close(forward(compiled, inputs), expected, atol=1e-4, rtol=1e-4)
    assert len(graphs) == 1
    has_sdpa = any("scaled_dot_product_attention" in name for name in graphs[0])
    has_flex = any("flex_attention" in name for name in graphs[0])
    assert (has_sdpa, has_flex) == (backend == "native", backend == "flex")


@pytest.mark.parametrize("model", ["flux", "sd3"])
def test_a_changed_setting_is_respected_after_compilation(model):
    routed, inputs = MODELS[model]()
    expected = forward(routed, inputs)
    compiled, graphs = graph_of_calls(routed)
    for backend in ("native", "reference", "flex"):
        routed.set_attention_backend(backend)
        torch.testing.assert_close(forward(compiled, inputs), expected, atol=1e-4, rtol=1e-4)
    assert [any("flex_attention" in name for name in graph) for graph in graphs] == [False, False, True]
    assert [any("scaled_dot" in name for name in graph) for graph in graphs] == [True, False, False]


@pytest.mark.parametrize("model", ["flux", "sd3"])
def test_a_scope_is_respected_after_compilation(model):
    routed, inputs = MODELS[model]()
    expected = forward(routed, inputs)
    compiled, graphs = graph_of_calls(routed)
    forward(compiled, inputs)
    with attention_backend("flex"):
        torch.testing.assert_close(forward(compiled, inputs), expected, atol=1e-4, rtol=1e-4)
    forward(compiled, inputs)
    assert [any("flex_attention" in name for name in graph) for graph in graphs] == [False, True]


def test_a_model_compiled_before_activation_follows_it():
    integration.deactivate()
    model, inputs = sd3_transformer()
    compiled, graphs = graph_of_calls(model)
    expected = forward(compiled, inputs)
    integration.activate()
    with attention_backend("flex"):
        torch.testing.assert_close(forward(compiled, inputs), expected, atol=1e-4, rtol=1e-4)
    assert [any("flex_attention" in name for name in graph) for graph in graphs] == [False, True]


@pytest.mark.parametrize("backend", ["native", "flex"])
def test_compile_repeated_blocks(backend):
    model, inputs = flux_transformer(layers=2)
    expected = forward(model, inputs)
    model.set_attention_backend(backend)
    graphs = []

    def compiler(graph, _):
        graphs.append(graph)
        return graph

    model.compile_repeated_blocks(fullgraph=True, backend=compiler)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            torch.testing.assert_close(forward(model, inputs), expected, atol=1e-4, rtol=1e-4)
    assert len(graphs) == 2, "one graph for each kind of block"


def test_flux_compiled_by_inductor():
    model, inputs = flux_transformer()
    expected = forward(model, inputs)
    model.set_attention_backend("native")
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(forward(compiled, inputs), expected, atol=1e-4, rtol=1e-4)


def test_a_member_of_the_enum_can_be_traced():
    from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

    def attend(query):
        return dispatch_attention_fn(query, query, query, backend=AttentionBackendName.FLEX)

    query = torch.randn(1, 8, 2, 16)
    compiled, graphs = graph_of_calls(attend)
    torch.testing.assert_close(compiled(query), attend(query))
    assert any("flex_attention" in name for name in graphs[0])


@pytest.mark.parametrize("backend", ["native", "flex"])
def test_skipped_scores_are_skipped_in_compiled_models(backend):
    """Perturbed attention guidance; see the test of that name for eager models."""
    model, inputs = flux_transformer()
    hook = AttentionProcessorSkipHook(None, skip_attention_scores=True)
    HookRegistry.check_if_exists_or_initialize(model.transformer_blocks[0].attn).register_hook(hook, "skip")
    expected = forward(model, inputs)
    model.set_attention_backend(backend)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(forward(compiled, inputs), expected, atol=1e-5, rtol=1e-5)
    torch._dynamo.reset()
    whole = torch.compile(model, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="attention scores are skipped outside of compiled"):
        forward(whole, inputs)
