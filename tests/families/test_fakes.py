"""The fakes compute attention, are strict about arguments, and have the vendors' quirks."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
import sys

import pytest
import torch

from attention_dispatch.backends.source import HubKernel
from contracts import load_record, names
from fakes import FakeCalls, functions, installed, kernel_repository, local_kernels

KERNELS = [name for name in names() if not name.startswith("kernels-")]
FLASH = [name for name in KERNELS if name.startswith(("flash_attn", "hub-flash"))]


def tensors(query_length=7, key_length=7, heads=4, kv_heads=4, head_dim=64, batch=2, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    shapes = ((query_length, heads), (key_length, kv_heads), (key_length, kv_heads))
    return [torch.randn(batch, *shape, head_dim, generator=generator).to(dtype) for shape in shapes]


def oracle(query, key, value, scale, keep=None):
    """BSHD attention in float64, written apart from the fakes; a row without a key gives 0 and -inf."""
    ratio = query.shape[2] // key.shape[2]
    out = torch.zeros(*query.shape[:3], value.shape[3], dtype=torch.float64)
    lse = torch.full((query.shape[0], query.shape[2], query.shape[1]), float("-inf"), dtype=torch.float64)
    for b in range(query.shape[0]):
        for h in range(query.shape[2]):
            for i in range(query.shape[1]):
                chosen = range(key.shape[1]) if keep is None else [j for j in range(key.shape[1]) if keep(b, i, j)]
                chosen = list(chosen)
                if not chosen:
                    continue
                scores = key[b, chosen, h // ratio].double() @ query[b, i, h].double() * scale
                lse[b, h, i] = scores.logsumexp(0)
                out[b, i, h] = scores.softmax(0) @ value[b, chosen, h // ratio].double()
    return out, lse


def assert_close(actual, expected, tolerance=2e-2):
    assert torch.allclose(actual.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("record", KERNELS)
def test_signature_is_the_recorded_one_and_binding_is_strict(record):
    contract = load_record(record)
    for name, fake in functions(record).items():
        assert inspect.signature(fake) == contract.functions[name].signature
        with pytest.raises(TypeError):
            fake()
        if not any(p.kind is p.VAR_KEYWORD for p in inspect.signature(fake).parameters.values()):
            required = [p for p in inspect.signature(fake).parameters.values() if p.default is p.empty]
            with pytest.raises(TypeError, match="no_such_argument"):
                fake(*[None] * len(required), no_such_argument=1)


def test_swallowed_arguments_are_recorded():
    calls = FakeCalls()
    fake = functions("sageattention-2.2.0", calls)["sageattn"]
    query, key, value = tensors()
    masked = fake(query, key, value, tensor_layout="NHD", attn_mask=torch.zeros(2, 1, 7, 7, dtype=torch.bool))
    assert torch.equal(masked, fake(query, key, value, tensor_layout="NHD"))
    assert calls.dropped == [("sageattn", "attn_mask")]


@pytest.mark.parametrize("record", FLASH)
@pytest.mark.parametrize("lengths", [(7, 7), (3, 7), (7, 3)])
def test_flash_is_bottom_right_causal(record, lengths):
    query, key, value = tensors(*lengths, kv_heads=2)
    fake = functions(record)["flash_attn_func"]
    lse_argument = {"return_lse", "return_attn_probs"} & set(inspect.signature(fake).parameters)
    result = fake(query, key, value, softmax_scale=0.3, causal=True, **dict.fromkeys(lse_argument, True))
    shift = lengths[1] - lengths[0]
    expected, expected_lse = oracle(query, key, value, 0.3, lambda b, i, j: j <= i + shift)
    if record == "flash_attn_3-tensor":
        assert_close(result, expected)
        return
    assert_close(result[0], expected)
    empty = expected_lse == float("-inf")
    assert result[1].dtype == torch.float32
    assert_close(result[1][~empty], expected_lse[~empty])
    positive_infinity = record.startswith(("flash_attn-", "hub-flash_attn2"))
    assert (result[1][empty] == (float("inf") if positive_infinity else float("-inf"))).all()


def test_flash_3_return_conventions():
    query, key, value = tensors()
    kinds = {record: type(functions(record)["flash_attn_func"](query, key, value)) for record in FLASH}
    assert kinds["flash_attn_3-tuple"] is tuple
    assert kinds["flash_attn_3-tensor"] is torch.Tensor
    assert kinds["flash_attn_3-optional"] is torch.Tensor
    with pytest.raises(TypeError):
        functions("flash_attn_3-tensor")["flash_attn_func"](query, key, value, return_attn_probs=True)


def test_flash_4_gives_its_lse_only_when_asked_or_needed():
    query, key, value = tensors()
    fake = functions("flash_attn_4-4.0.0b36")["flash_attn_func"]
    assert fake(query, key, value)[1] is None
    assert fake(query, key, value, return_lse=True)[1] is not None
    assert fake(query.requires_grad_(), key, value)[1] is not None
    with pytest.raises(RuntimeError, match="None"):
        fake(query, key, value, window_size=(-1, 0))


@pytest.mark.parametrize("record", ["flash_attn-2.8.3", "flash_attn_3-optional", "flash_attn_4-4.0.0b36"])
def test_flash_varlen_leaves_unused_rows_unwritten(record):
    query, key, value = (tensor[0].clone().requires_grad_() for tensor in tensors())
    starts_q, starts_k = torch.tensor([0, 3, 6], dtype=torch.int32), torch.tensor([0, 2, 5], dtype=torch.int32)
    fake = functions(record)["flash_attn_varlen_func"]
    result = fake(query, key, value, cu_seqlens_q=starts_q, cu_seqlens_k=starts_k, max_seqlen_q=3, max_seqlen_k=3)
    out = result[0] if isinstance(result, tuple) else result
    for rows, keys in ((slice(0, 3), slice(0, 2)), (slice(3, 6), slice(2, 5))):
        expected, _ = oracle(query[None, rows], key[None, keys], value[None, keys], 64**-0.5)
        assert_close(out[rows], expected[0])
    assert out[6:].isnan().all()
    out[:6].sum().backward()
    assert key.grad[5:].isnan().all()
    assert not key.grad[:5].isnan().any()
    with pytest.raises(RuntimeError, match="max_seqlen_k"):
        fake(query, key, value, cu_seqlens_q=starts_q, cu_seqlens_k=starts_k, max_seqlen_q=3, max_seqlen_k=2)


def test_sage_1_centres_the_callers_keys_in_place():
    query, key, value = tensors()
    before = key.clone()
    functions("sageattention-1.0.6")["sageattn"](query, key, value, tensor_layout="NHD", sm_scale=0.3)
    assert torch.allclose(key, before - before.mean(1, keepdim=True))


def test_sage_1_counts_the_missing_keys_of_its_last_block():
    query, key, value = tensors(batch=1)
    fake = functions("sageattention-1.0.6")["sageattn"]
    out = fake(query, key, value, tensor_layout="NHD", sm_scale=0.3, smooth_k=False)
    filled = [torch.nn.functional.pad(tensor, (0, 0, 0, 0, 0, 57)) for tensor in (key, value)]
    assert_close(out, oracle(query, *filled, 0.3)[0])
    causal = fake(query, key, value, tensor_layout="NHD", is_causal=True)
    assert causal[-1, :, -1].isnan().all() and not causal[-1, :, :-1].isnan().any()


def test_sage_detaches_its_output():
    query, key, value = (tensor.requires_grad_() for tensor in tensors())
    assert not functions("sageattention-2.2.0")["sageattn"](query, key, value, tensor_layout="NHD").requires_grad


def test_sage_2_fails_for_grouped_heads_with_lse():
    query, key, value = tensors(kv_heads=2)
    fake = functions("sageattention-2.2.0")["sageattn"]
    out = fake(query, key, value, tensor_layout="NHD")
    assert_close(out, oracle(query, key, value, 64**-0.5)[0])
    with pytest.raises(RuntimeError):
        fake(query, key, value, tensor_layout="NHD", return_lse=True)


def test_npu_masks_where_true_and_does_not_scale_by_default():
    query, key, value = tensors()
    fake = functions("torch_npu-2.13.0")["npu_fusion_attention"]
    assert_close(fake(query, key, value, 4, "BSND")[0], oracle(query, key, value, 1.0)[0])
    masked = torch.zeros(2, 1, 7, 7, dtype=torch.bool)
    masked[1, :, :, 5:] = True
    out, maximum, total, *_ = fake(query, key, value, 4, "BSND", atten_mask=masked, scale=0.3)
    expected, lse = oracle(query, key, value, 0.3, lambda b, i, j: b == 0 or j < 5)
    assert_close(out, expected)
    assert_close(maximum[..., 0] + total[..., 0].log(), lse)


def test_xla_does_not_scale_by_default_and_averages_for_empty_rows():
    query, key, value = (tensor.transpose(1, 2) for tensor in tensors())
    fake = functions("torch_xla-2.9.0")["flash_attention"]
    expected = oracle(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), 1.0)[0].transpose(1, 2)
    assert_close(fake(query, key, value), expected)
    ones, zeros = torch.ones(2, 7), torch.zeros(2, 7)
    out = fake(query, key, value, q_segment_ids=ones, kv_segment_ids=zeros)
    assert_close(out, value.double().mean(2, keepdim=True).expand_as(out))


def test_xformers_wants_expanded_aligned_biases():
    query, key, value = tensors(dtype=torch.float32)
    fake = functions("xformers-0.0.35")["memory_efficient_attention"]
    bias = torch.zeros(2, 4, 7, 8)[..., :7]
    assert_close(fake(query, key, value, bias, scale=0.3), oracle(query, key, value, 0.3)[0], 1e-5)
    with pytest.raises(ValueError, match="aligned"):
        fake(query, key, value, torch.zeros(2, 4, 7, 7))
    with pytest.raises(ValueError, match="expected"):
        fake(query, key, value, bias[:1])


def test_aiter_package_needs_the_lse_for_gradients_and_the_hub_kernel_has_none():
    query, key, value = (tensor.requires_grad_() for tensor in tensors())
    package = functions("aiter-0.1.7")["flash_attn_func"]
    with pytest.raises(AssertionError, match="return_lse"):
        package(query, key, value)
    assert package(query, key, value, return_lse=True)[0].requires_grad
    hub = functions("hub-aiter_flash_attn_ck-v1")["flash_attn_func"]
    assert not hub(query, key, value).requires_grad


def test_installed_is_importable_with_metadata_and_gone_afterwards():
    before = dict(sys.modules)
    with installed("flash_attn_4-4.0.0b36"):
        assert importlib.util.find_spec("flash_attn.cute") is not None
        assert callable(importlib.import_module("flash_attn.cute").flash_attn_func)
        assert importlib.metadata.version("flash-attn-4") == "4.0.0b36"
    assert {name for name in sys.modules if name.startswith("flash_attn")} == {
        name for name in before if name.startswith("flash_attn")
    }
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("flash-attn-4")


@pytest.mark.parametrize("record", [name for name in KERNELS if name.startswith("hub-")])
def test_hub_kernels_load_offline_through_the_real_library(record, tmp_path):
    pytest.importorskip("kernels", reason="the kernels library is not installed: pip install kernels")
    contract = load_record(record)
    repository = kernel_repository(tmp_path, record)
    with local_kernels({contract.distribution: repository}):
        loaded = HubKernel(contract.distribution, int(contract.version), tuple(contract.functions)).load()
    assert set(loaded) == set(contract.functions)
    assert inspect.signature(loaded[next(iter(loaded))]) == contract.functions[next(iter(loaded))].signature
