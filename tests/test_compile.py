"""What torch.compile traces: masks, switches and numbers that change shape or become symbolic, and lengths of zero."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from attention_dispatch import dispatch_attention_fn
from attention_dispatch.testing import attend

pytestmark = pytest.mark.usefixtures("one_thread", "fresh_dynamo")

MASKS = {
    "none": lambda q_len, k_len: None,
    "padding": lambda q_len, k_len: random(2, 1, 1, k_len) < 0.6,
    "all true": lambda q_len, k_len: torch.ones(2, 1, 1, k_len, dtype=torch.bool),
    "expanded": lambda q_len, k_len: (random(2, 1, 1, k_len) < 0.6).expand(2, 1, q_len, k_len),
    "per head": lambda q_len, k_len: random(2, 2, q_len, k_len) < 0.6,
    "bias": lambda q_len, k_len: random(2, 1, q_len, k_len),
}


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def random(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape)))


def tensors(q_len, k_len):
    return [random(2, length, 2, 16) * 2 - 1 for length in (q_len, k_len, k_len)]


@pytest.mark.parametrize("name", ["native", "_native_math", "_native_flash"])
def test_which_length_is_longer_matters_only_where_positions_are_compared(name):
    """Cross-attention to prompts of any length is one graph."""
    graphs = []

    def count(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    def call(query, key, value):
        return dispatch_attention_fn(query, key, value, backend=name)

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=count)
    for q_len, k_len in ((12, 12), (20, 9), (9, 20), (30, 31), (31, 30)):
        query, key, value = tensors(q_len, k_len)
        expected = attend(query.double(), key.double(), value.double())[0]
        assert float((compiled(query, key, value) - expected).abs().max()) < 1e-5
    assert len(graphs) <= 2


@pytest.mark.parametrize(
    ("name", "mask"),
    [*(("native", mask) for mask in MASKS), ("_native_flash", "per head"), ("flex", "per head"), ("auto", "per head")],
)
def test_masks_of_changing_lengths(name, mask):
    """With dynamic=True sizes are symbolic from the start, those of the mask and the number of heads included."""

    def call(query, key, value, mask):
        return dispatch_attention_fn(query, key, value, mask, is_causal=True, backend=name)

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="eager")
    for q_len, k_len in ((12, 12), (20, 9)):
        query, key, value = tensors(q_len, k_len)
        given = MASKS[mask](q_len, k_len)
        hides = {} if given is None else {"bias": given.double()} if mask == "bias" else {"keep": given}
        expected = attend(query.double(), key.double(), value.double(), is_causal=True, **hides)[0]
        assert float((compiled(query, key, value, given) - expected).abs().max()) < 1e-5


@pytest.mark.parametrize("name", ["flex", "reference"])
def test_numbers_that_are_symbolic(name):
    """With dynamic=True floats are symbolic too, and flex_attention cannot capture such."""
    options = {"softcap": 2.0, "scale": 0.3}

    def call(query, key, value):
        kwargs = {"softcap": options["softcap"]}
        return dispatch_attention_fn(query, key, value, scale=options["scale"], attention_kwargs=kwargs, backend=name)

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="eager")
    query, key, value = tensors(12, 12)
    for options["softcap"], options["scale"] in ((2.0, 0.3), (0.7, -0.5)):
        out = compiled(query, key, value)
        expected = attend(query.double(), key.double(), value.double(), **options)[0]
        assert float((out - expected).abs().max()) < 1e-5


@pytest.mark.parametrize("name", ["native", "_native_flash", "flex", "reference"])
@pytest.mark.parametrize(("q_len", "k_len"), [(0, 4), (4, 0)])
def test_lengths_of_zero(name, q_len, k_len):
    compiled = torch.compile(
        lambda *given: dispatch_attention_fn(*given, is_causal=True, backend=name), fullgraph=True, backend="eager"
    )
    out = compiled(*tensors(q_len, k_len))
    assert out.shape == (2, q_len, 2, 16) and not bool(out.any())


@pytest.mark.parametrize("name", ["native", "_native_math", "flex", "reference", "auto"])
@pytest.mark.parametrize("strict", [True, False])
def test_export_with_a_symbolic_length(name, strict):
    class Model(torch.nn.Module):
        def forward(self, query, key, value):
            return dispatch_attention_fn(query, key, value, is_causal=True, backend=name)

    given = tensors(8, 8)
    Model()(*given)
    lengths = ({1: torch.export.Dim("length", min=2, max=64)},) * 3
    exported = torch.export.export(Model(), tuple(given), dynamic_shapes=lengths, strict=strict)
    query, key, value = tensors(12, 12)
    expected = attend(query.double(), key.double(), value.double(), is_causal=True)[0]
    assert float((exported.module()(query, key, value) - expected).abs().max()) < 1e-5
