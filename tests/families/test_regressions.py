"""Faults seen in other dispatchers: each is computed right here, or refused before the kernel runs.

The numbers are explained in ``tests/test_regressions.py``.
"""

from __future__ import annotations

import pytest
import torch
from family_rows import BACKENDS, ROWS

from attention_dispatch import BackendRejectedError, BackendUnavailableError, InvalidCallError, dispatch_attention_fn
from attention_dispatch.backends.reference import attention
from attention_dispatch.call import canonicalise, spec_of
from attention_dispatch.capabilities import reasons_against

FIRST = dict(reversed(ROWS))
VARLEN = ("flash_varlen", "flash_varlen_hub", "_flash_varlen_3", "_flash_3_varlen_hub", "sage_varlen")
SAGE = [name for name in FIRST if "sage" in name]


def tensors(length=8, batch=2, heads=2, requires_grad=False, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(batch, length, heads, 64, generator=generator).to(dtype) for _ in range(3)]
    return [tensor.requires_grad_(requires_grad) for tensor in made]


def check(name, query, key, value, mask=None, **kwargs):
    out = dispatch_attention_fn(query, key, value, mask, backend=name, **kwargs)
    expected = attention(canonicalise(query, key, value, mask, **kwargs)).out
    assert torch.allclose(out.double(), expected.double(), atol=2e-2, rtol=2e-2)


def refused(name, code, *args, **kwargs):
    with pytest.raises(BackendRejectedError) as caught:
        dispatch_attention_fn(*args, backend=name, **kwargs)
    assert code in caught.value.codes


def test_2A2_xformers_applies_both_mask_and_causal(on_cpu):
    on_cpu("xformers", FIRST["xformers"])
    mask = torch.ones(2, 1, 8, 8, dtype=torch.bool)
    mask[:, :, :, 2] = False
    check("xformers", *tensors(), mask, is_causal=True)


@pytest.mark.parametrize("name", VARLEN)
@pytest.mark.parametrize("hidden", [slice(0, 3), slice(2, 5), slice(5, 8)], ids=["left", "interior", "right"])
def test_2A5_varlen_packs_the_kept_keys_not_a_prefix(name, hidden, on_cpu):
    on_cpu(name, FIRST[name])
    keep = torch.ones(2, 8, dtype=torch.bool)
    keep[1, hidden] = False
    # (B, K) with B != Q, so the two-dimensional form has one reading.
    check(name, *tensors(), keep)
    check(name, *tensors(), keep[:, None, None, :])


@pytest.mark.parametrize("name", VARLEN)
def test_2A6_varlen_never_reduces_a_mask_that_depends_on_the_query_or_head(name, on_cpu):
    on_cpu(name, FIRST[name])
    causal = torch.ones(8, 8, dtype=torch.bool).tril()
    per_head = torch.ones(1, 2, 1, 8, dtype=torch.bool)
    per_head[0, 1, 0, 3] = False
    for mask in (causal, causal[None, None], causal.expand(2, 8, 8), per_head, causal.float()):
        refused(name, "mask", *tensors(), mask)


@pytest.mark.parametrize("name", VARLEN)
def test_2A6_varlen_refuses_a_two_dimensional_mask_over_queries_and_keys(name, on_cpu):
    on_cpu(name, FIRST[name])
    mask = torch.ones(8, 8, dtype=torch.bool)
    mask[0, 1] = False
    refused(name, "mask", *tensors(batch=1), mask)


def test_2A7_xformers_reads_a_bool_mask_as_attend_or_not(on_cpu):
    on_cpu("xformers", FIRST["xformers"])
    check("xformers", *tensors(), torch.rand(2, 1, 8, 8) < 0.6)


def test_2A8_npu_float_masks_are_added_not_inverted(on_cpu):
    on_cpu("_native_npu", FIRST["_native_npu"])
    additive = torch.zeros(2, 1, 1, 8)
    additive[0, ..., :3] = -10000.0
    check("_native_npu", *tensors(), additive)
    check("_native_npu", *tensors(), -torch.rand(1, 2, 8, 8) - 0.1, scale=0.3)


def test_2A9_npu_does_not_drop_causal(on_cpu):
    on_cpu("_native_npu", FIRST["_native_npu"])
    check("_native_npu", *tensors(), is_causal=True)


def test_npu_states_its_scale(on_cpu):
    on_cpu("_native_npu", FIRST["_native_npu"])
    check("_native_npu", *tensors())


def test_2A10_xla_does_not_drop_the_scale(on_cpu):
    on_cpu("_native_xla", FIRST["_native_xla"])
    check("_native_xla", *tensors(), scale=1.0)
    check("_native_xla", *tensors(), scale=0.05)


@pytest.mark.parametrize("length", [513, 700, 1024])
def test_xla_pads_what_its_blocks_do_not_divide(length, on_cpu):
    on_cpu("_native_xla", FIRST["_native_xla"])
    check("_native_xla", *tensors(length, batch=1, heads=1), is_causal=True)
    keep = torch.ones(1, length, dtype=torch.bool)
    keep[0, 300:] = False
    check("_native_xla", *tensors(length, batch=1, heads=1), keep[:, None, None])


@pytest.mark.parametrize("name", [name for name in FIRST if not BACKENDS[name].capabilities[0].dropout])
def test_2A11_dropout_is_refused_where_the_kernel_has_none(name, on_cpu):
    on_cpu(name, FIRST[name])
    refused(name, "dropout", *tensors(), dropout_p=0.1)


@pytest.mark.parametrize("name", FIRST)
@pytest.mark.parametrize("kwargs", [{"window_size": (2, 2)}, {"softcap": 5.0}], ids=["window", "softcap"])
def test_2A12_window_and_softcap_are_served_or_refused(name, kwargs, on_cpu):
    backend, _ = on_cpu(name, FIRST[name])
    call = canonicalise(*tensors(), attention_kwargs=kwargs)
    codes = [reason.code for reason in reasons_against(backend.capabilities, spec_of(call))]
    if codes:
        refused(name, codes[0], *tensors(), attention_kwargs=kwargs)
    else:
        check(name, *tensors(), attention_kwargs=kwargs)


@pytest.mark.parametrize("name", SAGE)
def test_2A18_sage_never_returns_a_silently_detached_output(name, on_cpu):
    on_cpu(name, FIRST[name])
    detached = tensors()
    dispatch_attention_fn(*detached, backend=name)
    # The same shapes again, now with gradients: whatever was remembered must not answer.
    refused(name, "gradients", *tensors(requires_grad=True))
    with torch.no_grad():
        dispatch_attention_fn(*tensors(requires_grad=True), backend=name)


@pytest.mark.parametrize(("name", "record"), [row for row in ROWS if row[1] == "sageattention-1.0.6"])
def test_sage_1_leaves_the_callers_keys_alone(name, record, on_cpu):
    on_cpu(name, record)
    query, key, value = tensors()
    before = key.clone()
    for _ in range(2):
        dispatch_attention_fn(query, key, value, backend=name)
    assert torch.equal(key, before)


@pytest.mark.parametrize(("name", "record"), [row for row in ROWS if row[1] == "sageattention-1.0.6"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("length", [1, 64, 70, 130, 200])
def test_sage_1_counts_no_keys_behind_the_last_one(name, record, is_causal, length, on_cpu):
    on_cpu(name, record)
    check(name, *tensors(length), is_causal=is_causal)


def test_sage_1_counts_no_keys_behind_the_last_one_of_any_sequence(on_cpu):
    on_cpu("sage_varlen", "sageattention-1.0.6")
    keep = torch.arange(128) < torch.tensor([[64], [100], [0]])
    check("sage_varlen", *tensors(128, batch=3), keep)


def test_sage_1_runs_once_where_blocks_are_full(on_cpu):
    _, calls = on_cpu("sage", "sageattention-1.0.6")
    runs = []
    for length in (64, 63):
        before = len(calls.calls)
        dispatch_attention_fn(*tensors(length), backend="sage")
        # The first-use self-test has calls of its own, at another length.
        runs.append(sum(asked["q"].shape[1] == length for _, asked in calls.calls[before:]))
    assert runs == [1, 2]


def test_sage_1_refuses_keys_that_are_not_centred(on_cpu):
    on_cpu("sage", "sageattention-1.0.6")
    dispatch_attention_fn(*tensors(), backend="sage", attention_kwargs={"smooth_k": True})
    with pytest.raises(InvalidCallError, match="SageAttention 2"):
        dispatch_attention_fn(*tensors(), backend="sage", attention_kwargs={"smooth_k": False})


def test_sage_triton_takes_a_mask_that_sageattn_would_swallow(on_cpu):
    name = "_sage_qk_int8_pv_fp16_triton"
    _, calls = on_cpu(name, FIRST[name])
    check(name, *tensors(), torch.rand(2, 2, 8, 8) < 0.6)
    check(name, *tensors(), torch.randn(2, 1, 8, 8))
    assert calls.dropped == []


@pytest.mark.parametrize(
    "name", ["sage", "sage_hub", "_sage_qk_int8_pv_fp8_cuda", "_sage_qk_int8_pv_fp8_cuda_sm90", "flash", "_flash_3"]
)
def test_masks_are_refused_where_the_kernel_would_drop_them(name, on_cpu):
    on_cpu(name, FIRST[name])
    keep = torch.ones(2, 8, dtype=torch.bool)
    keep[0, :2] = False
    refused(name, "mask", *tensors(), keep)


@pytest.mark.parametrize("name", [name for name in FIRST if BACKENDS[name].capabilities[0].causal != "none"])
@pytest.mark.parametrize("lengths", [(3, 8), (8, 3), (1, 8)])
def test_2A21_causal_of_different_lengths_is_top_left_or_refused(name, lengths, on_cpu):
    backend, _ = on_cpu(name, FIRST[name])
    query = tensors(lengths[0])[0]
    _, key, value = tensors(lengths[1])
    call = canonicalise(query, key, value, is_causal=True)
    if reasons_against(backend.capabilities, spec_of(call)):
        refused(name, "causal", query, key, value, is_causal=True)
    else:
        check(name, query, key, value, is_causal=True)


@pytest.mark.parametrize(("name", "record"), ROWS)
def test_2D_lse_has_one_layout_dtype_and_base(name, record, on_cpu):
    backend, _ = on_cpu(name, record)
    query, key, value = tensors()
    call = canonicalise(query, key, value, attention_kwargs={"return_lse": True})
    spec = spec_of(call)
    if reasons_against(backend.capabilities, spec) or backend.extra_reasons(spec):
        refused(name, "lse", query, key, value, attention_kwargs={"return_lse": True})
        return
    out, lse = dispatch_attention_fn(query, key, value, backend=name, attention_kwargs={"return_lse": True})
    assert out.shape == query.shape and lse.shape == (2, 2, 8) and lse.dtype == torch.float32
    assert torch.allclose(lse, attention(call).lse, atol=2e-2)


@pytest.mark.parametrize(("name", "record"), [row for row in ROWS if "flash_3" in row[0] or "varlen_3" in row[0]])
def test_flash_3_never_unpacks_a_bare_tensor(name, record, on_cpu):
    on_cpu(name, record)
    # Two samples: unpacking (B, S, H, D) would split them and look like a pair.
    check(name, *tensors(batch=2))


@pytest.mark.parametrize("name", ["_flash_3", "_flash_3_hub", "flash_4"])
def test_2B_training_reaches_the_kernels_own_backward(name, on_cpu):
    on_cpu(name, FIRST[name])
    query, key, value = tensors(requires_grad=True)
    dispatch_attention_fn(query, key, value, backend=name).sum().backward()
    assert all(tensor.grad is not None and tensor.grad.abs().sum() > 0 for tensor in (query, key, value))


@pytest.mark.parametrize("name", ["flash", "flash_varlen"])
def test_2E_no_dropout_is_invented_to_get_the_lse(name, on_cpu):
    _, calls = on_cpu(name, FIRST[name])
    dispatch_attention_fn(*tensors(), backend=name, attention_kwargs={"return_lse": True})
    assert calls.calls[-1][1]["dropout_p"] == 0.0


def test_2B_fp8_sage_runs_where_it_was_made_for():
    [row] = BACKENDS["_sage_qk_int8_pv_fp8_cuda"].capabilities
    assert {"sm_89", "sm_120"} <= set(row.architectures)
    [hopper] = BACKENDS["_sage_qk_int8_pv_fp8_cuda_sm90"].capabilities
    assert hopper.architectures == ("sm_90",)


def test_sage_options_are_checked_and_reach_the_kernel(on_cpu):
    name = "_sage_qk_int8_pv_fp8_cuda"
    _, calls = on_cpu(name, FIRST[name])
    options = {"qk_quant_gran": "per_warp", "pv_accum_dtype": "fp32+fp32", "smooth_k": False, "smooth_v": True}
    dispatch_attention_fn(*tensors(), backend=name, attention_kwargs=options)
    assert {option: calls.calls[-1][1][option] for option in options} == options
    with pytest.raises(ValueError, match="pv_accum_dtype"):
        dispatch_attention_fn(*tensors(), backend=name, attention_kwargs={"pv_accum_dtype": "fp64"})
    hopper = "_sage_qk_int8_pv_fp8_cuda_sm90"
    on_cpu(hopper, FIRST[hopper])
    refused(hopper, "options", *tensors(), attention_kwargs={"smooth_v": True})


@pytest.mark.parametrize("name", FIRST)
def test_2B_a_backend_that_is_not_installed_says_so(name, registered):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU, and may have the package")
    with pytest.raises(BackendUnavailableError) as caught:
        dispatch_attention_fn(*tensors(), backend=name)
    assert caught.value.reasons and all(reason.fix for reason in caught.value.reasons)
