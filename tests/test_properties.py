"""Random calls: equal to the oracle, or refused with exactly the codes that the declared capabilities predict."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attention_dispatch import InvalidCallError, dispatch_attention_fn
from attention_dispatch.testing import Case, build, check_conformance, conformance_cases
from attention_dispatch.testing.case_masks import MASKS
from attention_dispatch.testing.cases import LAYOUTS

pytestmark = pytest.mark.usefixtures("one_thread")

ANY_EXAMPLE = settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
TWO_DIMENSIONAL = ("padding_right", "bool_QK", "bias_QK")
TENSOR_MASKS = tuple(name for name in MASKS if not name.startswith("block"))
WINDOWS = st.tuples(st.integers(-1, 6), st.integers(-1, 6))


@st.composite
def calls(draw: st.DrawFn) -> Case:
    grad = draw(st.booleans())
    mask = draw(st.sampled_from(("none", "none", *TENSOR_MASKS)))
    kv_heads = draw(st.integers(1, 3))
    layout = draw(st.sampled_from(LAYOUTS))
    q_len, head_dim = draw(st.integers(1, 20)), draw(st.integers(1, 40))
    groups = draw(st.integers(1, 3))
    packed = layout == "packed"
    return Case(
        f"random_{draw(st.integers(0, 2**32))}",
        batch=draw(st.integers(1, 3)),
        q_len=q_len,
        k_len=q_len if packed else draw(st.integers(1, 20)),
        heads=kv_heads if packed else kv_heads * groups,
        kv_heads=kv_heads,
        head_dim=head_dim,
        head_dim_v=None if packed else draw(st.none() | st.integers(1, 40)),
        dtype=draw(st.sampled_from((torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16))),
        mask=mask,
        grad=grad,
        mask_grad=grad and mask.startswith("bias") and mask != "bias_BQK" and draw(st.booleans()),
        lse=draw(st.booleans()),
        deterministic=draw(st.integers(0, 9)) == 0,
        is_causal=draw(st.booleans()),
        scale=draw(st.none() | st.floats(-1.0, 1.0, width=32)),
        window_size=draw(st.just((-1, -1)) | WINDOWS),
        softcap=draw(st.sampled_from((0.0, 0.0, 0.0, 3.0))),
        layout=layout,
    )


@st.composite
def calls_of_few_kinds(draw: st.DrawFn) -> Case:
    """Random lengths, batches and contents, but few kinds, each of which costs a compilation."""
    kv_heads = draw(st.sampled_from((1, 2)))
    return Case(
        f"random_{draw(st.integers(0, 2**32))}",
        batch=draw(st.integers(1, 3)),
        q_len=draw(st.integers(1, 40)),
        k_len=draw(st.integers(1, 40)),
        heads=2,
        kv_heads=kv_heads,
        head_dim=16,
        mask=draw(st.sampled_from(("none", "padding_scattered", "bool_per_head", "bias_heads", "block_documents"))),
        is_causal=draw(st.booleans()),
        window_size=draw(st.sampled_from(((-1, -1), (-1, -1), (3, 2)))),
        softcap=draw(st.sampled_from((0.0, 0.0, 2.0))),
        lse=draw(st.integers(0, 9)) == 0,
        grad=draw(st.integers(0, 9)) == 0,
    )


def check(name: str, case: Case) -> None:
    if case.mask in TWO_DIMENSIONAL and case.batch == case.q_len > 1:
        inputs = build(case)
        with pytest.raises(InvalidCallError, match="can mean"):
            dispatch_attention_fn(*inputs[:3], inputs.mask.argument, backend=name, **case.arguments)
        return
    check_conformance(name, case)


@pytest.mark.parametrize("name", ["native", "_native_math", "_native_flash", "reference"])
@settings(ANY_EXAMPLE, max_examples=800)
@given(case=calls())
def test_random_calls(name, case):
    check(name, case)


@settings(ANY_EXAMPLE, max_examples=150)
@given(case=calls_of_few_kinds())
def test_random_calls_of_flex(case):
    check("flex", case)


@settings(ANY_EXAMPLE, max_examples=300)
@given(
    case=calls(), p=st.sampled_from((0.0, 0.0, 0.3)), auto=st.sampled_from(("auto", ["flex", "native", "reference"]))
)
def test_random_calls_under_a_permission_are_exact(case, p, auto):
    """Whatever of the sequence, or of auto, runs it: the same result, never a quantised one."""
    if case.mask in TWO_DIMENSIONAL and case.batch == case.q_len:
        return
    inputs = build(case)
    arguments = {**case.arguments, "dropout_p": p}
    result = dispatch_attention_fn(*inputs[:3], inputs.mask.argument, backend=auto, **arguments)
    if p:
        return
    out = result[0] if case.lse else result
    expected = dispatch_attention_fn(*inputs[:3], inputs.mask.argument, backend="reference", **arguments)
    expected = expected[0] if case.lse else expected
    size = 8 * torch.finfo(case.dtype).eps * (1 + float(expected.detach().abs().max()))
    assert float((out - expected).detach().abs().max()) <= max(size, 16 * torch.finfo(torch.float32).eps)


@settings(ANY_EXAMPLE, max_examples=100)
@given(case=st.sampled_from(conformance_cases("cpu")), data=st.data())
def test_a_call_without_keys_or_queries_gives_zeros(case, data):
    """Zero lengths are calls too; large values must not turn zeros into NaN."""
    q_len, k_len = data.draw(st.sampled_from(((0, 5), (5, 0), (0, 0))))
    query = torch.full((2, q_len, 4, 16), 3e38).requires_grad_(case.grad)
    key = torch.full((2, k_len, 2, 16), 3e38).requires_grad_(case.grad)
    name = data.draw(st.sampled_from(("native", "flex", "reference", "_native_flash")))
    kwargs = {"return_lse": True} if case.lse else None
    result = dispatch_attention_fn(query, key, key, enable_gqa=True, attention_kwargs=kwargs, backend=name)
    out = result[0] if case.lse else result
    assert out.shape == (2, q_len, 4, 16) and not bool(out.any())
    if case.lse:
        assert result[1].shape == (2, 4, q_len) and bool((result[1] == float("-inf")).all())
    if case.grad:
        for gradient in torch.autograd.grad(out.sum(), (query, key)):
            assert not bool(gradient.any())
