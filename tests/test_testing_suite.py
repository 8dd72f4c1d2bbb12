"""The suite itself is tested: every deliberately wrong backend fails it, the honest one passes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from attention_dispatch import Backend, list_backends
from attention_dispatch.backends.reference import CAPABILITIES, attention
from attention_dispatch.capabilities import Capabilities, Tolerance
from attention_dispatch.testing import (
    WRONG_BACKENDS,
    ConformanceError,
    attend,
    check_conformance,
    conformance_cases,
    poisoned_memory,
)
from attention_dispatch.testing.cases import build
from attention_dispatch.testing.oracle import eight_bit_attention, exact_attention
from attention_dispatch.testing.tolerances import declared_difference, declared_lse_difference
from attention_dispatch.testing.wrong_backends import HONEST_BACKEND

pytestmark = pytest.mark.usefixtures("one_thread")

CASES = {case.name: case for case in conformance_cases("cpu")}

CAUGHT_BY = {
    "ignores_causal": "causal",
    "causal_bottom_right": "causal_fewer_queries",
    "mask_beats_causal": "causal_padding",
    "ignores_window": "window_5_3",
    "ignores_scale": "scale_larger",
    "ignores_softcap": "softcap",
    "drops_dropout": "dropout",
    "does_not_rescale_dropout": "dropout",
    "pads_right_only": "padding_left",
    "any_over_queries": "bool_QK",
    "first_head_mask": "bool_per_head",
    "bool_mask_as_numbers": "padding_interior",
    "ignores_block_table": "block_table",
    "kv_head_modulo": "gqa",
    "lse_base_two": "gqa",
    "lse_by_query": "gqa",
    "lse_of_empty_rows_zero": "padding_empty_lse",
    "no_lse": "gqa",
    "empty_rows_nan": "padding_empty",
    "empty_rows_average": "bool_empty_rows",
    "leaves_unwritten": "plain_fp32",
    "writes_nothing": "plain_fp32",
    "constant": "plain_fp32",
    "detaches_gradients": "grad_fp32",
    "wrong_key_gradient": "grad_fp32",
    "no_mask_gradient": "bias_heads_mask_grad",
    "differentiable_lse": "grad_fp32",
    "writes_into_query": "plain_fp32",
    "low_precision": "plain_bf16",
    "random": "deterministic",
    "returns_float32": "plain_bf16",
    "transposes_output": "plain_fp32",
}


@pytest.mark.parametrize(("mistake", "case"), CAUGHT_BY.items())
def test_a_wrong_backend_fails_the_case_meant_for_its_mistake(mistake, case):
    with pytest.raises(ConformanceError):
        check_conformance(WRONG_BACKENDS[mistake], CASES[case])


@pytest.mark.parametrize(("mistake", "case"), CAUGHT_BY.items())
def test_the_tolerance_of_a_quantised_backend_hides_no_mistake(mistake, case):
    backend = WRONG_BACKENDS[mistake]
    rows = tuple(replace(row, tolerance=Tolerance(0.03, 0.999)) for row in backend.capabilities)
    with pytest.raises(ConformanceError):
        check_conformance(replace(backend, capabilities=rows), CASES[case])


def test_a_stale_result_fails():
    """Remembering the first result of a shape passes that first case and fails the next."""
    backend = WRONG_BACKENDS["first_result"]
    check_conformance(backend, CASES["padding_left"])
    with pytest.raises(ConformanceError, match="output"):
        check_conformance(backend, CASES["padding_interior"])


def test_a_crash_is_not_a_refusal():
    with pytest.raises(RuntimeError, match="misaligned"):
        check_conformance(WRONG_BACKENDS["crashes_on_odd_lengths"], CASES["fewer_queries"])


def test_a_refusal_of_what_is_declared_fails():
    with pytest.raises(ConformanceError, match="declares that it serves"):
        check_conformance(WRONG_BACKENDS["refuses_undeclared"], CASES["softcap"])


def test_every_wrong_backend_has_its_case():
    handled = set(CAUGHT_BY) | {"first_result", "crashes_on_odd_lengths", "refuses_undeclared"}
    assert handled == set(WRONG_BACKENDS)


@pytest.mark.parametrize("case", CASES.values(), ids=lambda case: case.name)
def test_the_honest_backend_passes(case):
    assert check_conformance(HONEST_BACKEND, case).status == "computed"


def test_a_backend_object_is_registered_only_for_the_check():
    before = list_backends()
    check_conformance(HONEST_BACKEND, CASES["plain_fp32"])
    assert list_backends() == before
    # One that stands in for a registered name gives the name back.
    check_conformance(Backend("native", "test", (CAPABILITIES,), attention), CASES["plain_fp32"])
    assert check_conformance("native", CASES["softcap"]).codes == {"softcap"}


def test_what_is_not_declared_is_refused_with_its_code():
    nothing = Capabilities(devices=("cpu",), dtypes=(torch.float32,))
    backend = Backend("declares_little", "test", (nothing,), attention)
    expected = {
        "plain_fp32": set(),
        "plain_bf16": {"dtype"},
        "padding_left": {"mask"},
        "causal_lse": {"causal", "lse"},
        "window_grad": {"window", "gradients"},
        "softcap": {"softcap"},
        "dropout": {"dropout"},
        "gqa": {"gqa", "lse"},
        "dim_v_smaller": {"head_dim_v", "lse"},
    }
    assert {name: set(check_conformance(backend, CASES[name]).codes) for name in expected} == expected


def test_the_oracle_agrees_with_torch_where_both_are_defined():
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 7, 3, 5, generator=generator, dtype=torch.float64) for _ in range(3))
    keep = torch.rand(2, 3, 7, 7, generator=generator) < 0.7
    keep[..., 0] = True
    out, lse = attend(query, key, value, keep=keep, scale=0.4)
    swapped = [tensor.transpose(1, 2) for tensor in (query, key, value)]
    expected = torch.nn.functional.scaled_dot_product_attention(*swapped, attn_mask=keep, scale=0.4)
    scores = (swapped[0] @ swapped[1].mT * 0.4).masked_fill(~keep, float("-inf"))
    assert torch.allclose(out.transpose(1, 2), expected, rtol=0, atol=1e-12)
    assert torch.allclose(lse, scores.logsumexp(-1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["causal_lse", "large_scores"])
def test_a_declared_tolerance_grows_with_the_scores_and_not_otherwise(name):
    inputs = build(CASES[name], "cpu")
    exact, rounded = exact_attention(CASES[name], inputs), eight_bit_attention(CASES[name], inputs)
    declared = Tolerance(0.03, 0.999)
    inevitable = float((rounded.out - exact.out).norm() / exact.out.norm())
    assert (inevitable > 0.03) == (name == "large_scores")
    allowed = max(0.03, 2 * inevitable)
    for share in (0.95, 1.05):
        noise = torch.randn(exact.out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        wrong = exact.out + noise * (share * allowed * exact.out.norm() / noise.norm())
        assert (declared_difference(wrong, exact.out, rounded.out, declared) is None) == (share < 1)
    worst = max(0.1, 2 * float((rounded.lse - exact.lse).abs().max()))
    assert declared_lse_difference(exact.lse + 0.95 * worst, exact.lse, rounded.lse) is None
    assert declared_lse_difference(exact.lse + 1.05 * worst, exact.lse, rounded.lse) is not None


def test_poisoned_memory_reaches_torch_empty_and_is_taken_away():
    before = (torch.empty, torch.empty_like, torch.empty_strided, torch.Tensor.new_empty)
    with poisoned_memory(torch.zeros(8)):
        made = (torch.empty(4), torch.empty_like(torch.zeros(3)), torch.empty_strided((2,), (1,)), torch.zeros(1).new_empty(2))  # fmt: skip
        assert all(bool(tensor.isnan().all()) for tensor in made)
        assert torch.empty(3, dtype=torch.int64).shape == (3,)
    assert before == (torch.empty, torch.empty_like, torch.empty_strided, torch.Tensor.new_empty)
