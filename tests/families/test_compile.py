"""Every CUDA family appears in a graph as one operator: no graph breaks, gradients included, few recompilations."""

from __future__ import annotations

import pytest
import torch
from family_rows import ROWS

from attention_dispatch import BackendRejectedError, BackendUnavailableError, dispatch_attention_fn
from attention_dispatch.backends.reference import attention
from attention_dispatch.call import canonicalise

CUDA_ROWS = [row for row in ROWS if not row[0].startswith("_native")]
DIFFERENTIABLE = [row for row in CUDA_ROWS if row[0].startswith(("flash", "_flash", "xformers"))]
HEADS = 4


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def tensors(length=9, head_dim=64, requires_grad=False):
    generator = torch.Generator().manual_seed(length)
    shape = (2, length, HEADS, head_dim)
    made = [torch.randn(shape, generator=generator).to(torch.bfloat16) for _ in range(3)]
    return [tensor.requires_grad_(requires_grad) for tensor in made]


def close(actual, expected):
    return torch.allclose(actual.double(), expected.double(), atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize(("name", "record"), CUDA_ROWS)
def test_fullgraph_forward(name, record, on_cpu):
    backend, _ = on_cpu(name, record)
    query, key, value = tensors()
    capabilities = backend.capabilities[0]
    mask = None
    if "key_padding" in capabilities.masks:
        mask = torch.ones(2, 9, dtype=torch.bool)
        mask[0, 1:4] = mask[1, 7:] = False
    kwargs = {"is_causal": mask is None}

    @torch.compile(fullgraph=True, backend="aot_eager")
    def attend(query, key, value, mask):
        return dispatch_attention_fn(query * 1.0, key, value, mask, backend=name, **kwargs)

    with torch.no_grad():
        out = attend(query, key, value, mask)
    assert close(out, attention(canonicalise(query, key, value, mask, **kwargs)).out)


@pytest.mark.parametrize(("name", "record"), DIFFERENTIABLE)
def test_fullgraph_gradients(name, record, on_cpu):
    on_cpu(name, record)
    query, key, value = tensors(requires_grad=True)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def attend(query, key, value):
        return dispatch_attention_fn(query, key, value, is_causal=True, backend=name)

    weight = torch.randn(query.shape, generator=torch.Generator().manual_seed(5)).to(query.dtype)
    actual = torch.autograd.grad(attend(query, key, value), (query, key, value), weight)
    exact = attention(canonicalise(query, key, value, is_causal=True)).out
    expected = torch.autograd.grad(exact, (query, key, value), weight)
    for one, other in zip(actual, expected, strict=True):
        assert close(one, other)


def test_gradient_of_dropout_repeats_the_mask_of_the_forward_pass(on_cpu):
    on_cpu("flash", "flash_attn-2.8.3")
    query, key, value = tensors(requires_grad=True)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def attend(query, key, value):
        return dispatch_attention_fn(query, key, value, dropout_p=0.5, backend="flash")

    out = attend(query, key, value)
    weight = torch.randn(out.shape).to(out.dtype)
    torch.rand(100)
    (gradient,) = torch.autograd.grad(out, (value,), weight)
    # The output is linear in value, so <out, weight> = <value, gradient> only if both passes drop the same weights.
    left, right = (out.double() * weight.double()).sum(), (value.double() * gradient.double()).sum()
    assert abs(left - right) < 0.05 * out.double().norm() * weight.double().norm() / 10


@pytest.mark.parametrize(("name", "record"), [("flash", "flash_attn-2.8.3"), ("flash_varlen", "flash_attn-2.8.3")])
def test_five_lengths_compile_at_most_twice(name, record, on_cpu):
    on_cpu(name, record)
    graphs = []

    def count(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    @torch.compile(fullgraph=True, backend=count)
    def attend(query, key, value):
        return dispatch_attention_fn(query, key, value, backend=name)

    with torch.no_grad():
        for length in (9, 10, 12, 17, 33):
            query, key, value = tensors(length)
            assert close(attend(query, key, value), attention(canonicalise(query, key, value)).out)
    assert len(graphs) <= 2


def test_lse_in_a_graph(on_cpu):
    on_cpu("flash_varlen", "flash_attn-2.8.3")
    query, key, value = tensors()
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1] = False

    @torch.compile(fullgraph=True, backend="aot_eager")
    def attend(query, key, value, mask):
        return dispatch_attention_fn(
            query, key, value, mask, backend="flash_varlen", attention_kwargs={"return_lse": True}
        )

    with torch.no_grad():
        out, lse = attend(query, key, value, mask)
    expected = attention(canonicalise(query, key, value, mask, attention_kwargs={"return_lse": True}))
    assert close(out, expected.out)
    assert (lse[1] == float("-inf")).all()
    assert close(lse[0], expected.lse[0])


@pytest.mark.parametrize("name", ["flash", "flash_4", "sage"])
def test_causal_with_more_queries_than_keys_in_a_graph(name, on_cpu):
    on_cpu(name, {"flash": "flash_attn-2.8.3", "flash_4": "flash_attn_4-4.0.0b36", "sage": "sageattention-2.2.0"}[name])
    query, (_, key, value) = tensors(12)[0], tensors(7)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def attend(query, key, value):
        return dispatch_attention_fn(query, key, value, is_causal=True, backend=name)

    with torch.no_grad():
        out = attend(query, key, value)
    assert close(out, attention(canonicalise(query, key, value, is_causal=True)).out)


def test_sage_options_reach_the_kernel_in_a_graph(on_cpu):
    name = "_sage_qk_int8_pv_fp16_cuda"
    _, calls = on_cpu(name, "sageattention-2.2.0")
    query, key, value = tensors()
    options = {"pv_accum_dtype": "fp16+fp32", "qk_quant_gran": "per_warp", "smooth_v": True}

    @torch.compile(fullgraph=True, backend="aot_eager")
    def attend(query, key, value):
        return dispatch_attention_fn(query, key, value, backend=name, attention_kwargs=options)

    with torch.no_grad():
        attend(query, key, value)
    asked = calls.calls[-1][1]
    assert {option: asked[option] for option in options} == options


@pytest.mark.parametrize("fullgraph", [True, False])
@pytest.mark.parametrize("requires_grad", [True, False])
def test_a_refusal_in_a_graph_is_the_refusal_of_an_eager_call(fullgraph, requires_grad, on_cpu):
    on_cpu("flash", "flash_attn-2.8.3")
    call = [*tensors(requires_grad=requires_grad), torch.ones(2, 1, 9, 9, dtype=torch.bool).tril()]

    def attend(query, key, value, mask):
        return dispatch_attention_fn(query * 1.0, key, value, mask, backend="flash") + 1.0

    compiled = torch.compile(attend, fullgraph=fullgraph, backend="aot_eager")
    for _ in range(2):
        with pytest.raises(BackendRejectedError, match="backend 'flash' cannot run this call") as caught:
            compiled(*call)
        assert caught.value.codes == ("mask",)
        # torch 2.9 adds where in its graph it was.
        message = str(caught.value).partition("While executing")[0]
        assert "bool mask" in message and "CallSpec" not in message


def test_an_unavailable_backend_in_a_graph_says_what_to_install(registered):
    @torch.compile(fullgraph=True, backend="aot_eager")
    def attend(query):
        return dispatch_attention_fn(query, query, query, backend="_native_npu", attention_kwargs={"return_lse": True})

    with pytest.raises((BackendUnavailableError, BackendRejectedError), match="npu"):
        attend(tensors()[0])
