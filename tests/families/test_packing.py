"""Packing of keys: once per mask object, no waiting for the device, usable in training after inference."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from attention_dispatch import dispatch_attention_fn, packing
from attention_dispatch.backends.reference import attention
from attention_dispatch.call import canonicalise


def tensors(requires_grad=False, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(3, 6, 2, 64, generator=generator).to(dtype) for _ in range(3)]
    return [tensor.requires_grad_(requires_grad) for tensor in made]


def padding():
    return torch.tensor([[0, 1, 1, 0, 1, 0], [0, 0, 0, 0, 0, 0], [1, 0, 0, 1, 1, 1]]).bool()


def test_layout():
    packed = packing.pack_keys(padding(), 3)
    assert packed.order[:7].tolist() == [1, 2, 4, 12, 15, 16, 17]
    assert sorted(packed.order.tolist()) == list(range(18))
    assert packed.starts.tolist() == [0, 3, 3, 7]
    assert packed.starts.dtype == torch.int32
    assert packed.empty.tolist() == [False, True, False]
    assert packed.kept.tolist() == [True] * 7 + [False] * 11


def test_one_mask_for_the_whole_batch():
    packed = packing.pack_keys(padding()[:1], 3)
    assert packed.starts.tolist() == [0, 3, 6, 9]


def test_no_result_depends_on_a_value_read_back():
    # A fake tensor has no values: any .item(), .tolist() or nonzero() raises here.
    with FakeTensorMode():
        packed = packing.pack_keys(torch.ones(3, 6, dtype=torch.bool), 3)
        key = torch.zeros(3, 6, 2, 8)
        assert packing.packed(key, packed).shape == (18, 2, 8)


@pytest.mark.parametrize("form", ["2d", "4d"])
def test_computed_once_per_mask_and_shared_by_layers(form, on_cpu, monkeypatch):
    monkeypatch.setenv("ATTENTION_DISPATCH_SELF_TEST", "0")
    on_cpu("flash_varlen", "flash_attn-2.8.3")
    runs = []
    original = packing._pack
    monkeypatch.setattr(packing, "_pack", lambda mask: (runs.append(1), original(mask))[1])
    query, key, value = tensors()
    mask = padding()
    for _layer in range(4):
        dispatch_attention_fn(query, key, value, mask if form == "2d" else mask[:, None, None], backend="flash_varlen")
    assert len(runs) == 1
    mask[0, 0] = True
    out = dispatch_attention_fn(query, key, value, mask, backend="flash_varlen")
    assert len(runs) == 2
    expected = attention(canonicalise(query, key, value, mask)).out
    assert torch.allclose(out.double(), expected.double(), atol=2e-2)


def test_training_after_inference_with_one_mask(on_cpu):
    on_cpu("flash_varlen", "flash_attn-2.8.3")
    mask = padding()
    with torch.inference_mode():
        dispatch_attention_fn(*tensors(), mask, backend="flash_varlen")
    assert not packing.pack_keys(mask, 3).order.is_inference()
    assert not packing.uniform_starts(3, 6, torch.device("cpu")).is_inference()
    query, key, value = tensors(requires_grad=True)
    dispatch_attention_fn(query, key, value, mask, backend="flash_varlen").sum().backward()
    assert key.grad.isfinite().all()


def test_gradients_of_dropped_keys_are_zero(on_cpu):
    on_cpu("flash_varlen", "flash_attn-2.8.3")
    query, key, value = tensors(requires_grad=True)
    dispatch_attention_fn(query, key, value, padding(), backend="flash_varlen").sum().backward()
    for gradient in (key.grad, value.grad):
        assert (gradient[~padding()] == 0).all()
    assert (query.grad[1] == 0).all()
