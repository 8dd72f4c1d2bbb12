"""Masks as objects: what is remembered about them, for how long, and that a changed mask is not the old one."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from attention_dispatch import dispatch_attention_fn, explain
from attention_dispatch.backends import flex
from attention_dispatch.testing import attend

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ("native", "_native_math", "_native_flash", "flex", "reference")


def tensors(length=24):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, length, 4, 16, generator=generator) for _ in range(3)]


def assert_close(out, expected):
    assert float((out - expected).abs().max()) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_a_mask_changed_in_place_is_read_again(name):
    query, key, value = tensors()
    mask = torch.ones(2, 1, 24, 24, dtype=torch.bool).tril()
    dispatch_attention_fn(query, key, value, mask, is_causal=True, backend=name)
    mask[..., 5:] = False
    out = dispatch_attention_fn(query, key, value, mask, is_causal=True, backend=name)
    assert_close(out, attend(query.double(), key.double(), value.double(), keep=mask, is_causal=True)[0])
    mask.fill_(True)
    out = dispatch_attention_fn(query, key, value, mask, backend=name)
    assert_close(out, attend(query.double(), key.double(), value.double())[0])


@pytest.mark.parametrize("name", NAMES)
def test_views_of_one_mask_are_told_apart(name):
    query, key, value = tensors()
    whole = torch.rand(2, 48, generator=torch.Generator().manual_seed(1)) < 0.6
    whole[:, ::24] = True
    for part in (whole[:, :24], whole[:, 24:], whole[:, :24].flip(0), whole[:1, :24].expand(2, -1)):
        out = dispatch_attention_fn(query, key, value, part[:, None, None], is_causal=True, backend=name)
        wide = (tensor.double() for tensor in (query, key, value))
        assert_close(out, attend(*wide, keep=part[:, None, None], is_causal=True)[0])


@pytest.mark.parametrize("shape", [(2, 24), (2, 1, 1, 24), (2, 1, 24, 24), (2, 4, 24, 24)])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_mask_is_freed_with_its_last_user(shape, dtype):
    query, key, value = tensors()
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.6
    mask = mask if dtype == torch.bool else mask.float()
    alive = weakref.ref(mask)
    for name in NAMES:
        dispatch_attention_fn(
            query, key, value, mask if len(shape) == 4 else mask[:, None, None], is_causal=True, backend=name
        )
    del mask
    gc.collect()
    assert alive() is None


def test_flex_builds_one_block_mask_per_mask_object(monkeypatch):
    built = []
    original = flex._create
    monkeypatch.setattr(flex, "_create", lambda *arguments: built.append(arguments) or original(*arguments))
    query, key, value = tensors()
    mask = torch.rand(2, 24, generator=torch.Generator().manual_seed(1)) < 0.6
    for _layer in range(4):
        dispatch_attention_fn(query, key, value, mask[:, None, None, :], backend="flex")
    assert len(built) == 1
    block_mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, 24, 24, device="cpu")
    for _layer in range(4):
        dispatch_attention_fn(query, key, value, block_mask, backend="flex", attention_kwargs={"window_size": (3, -1)})
    assert len(built) == 2


def test_two_block_masks_that_share_a_table_are_told_apart():
    query, key, value = tensors()
    wide = create_block_mask(lambda b, h, q, k: q >= k, None, None, 24, 24, device="cpu")
    narrow = create_block_mask(lambda b, h, q, k: q == k, None, None, 24, 24, device="cpu")
    narrow.kv_indices, narrow.kv_num_blocks = wide.kv_indices, wide.kv_num_blocks
    dispatch_attention_fn(query, key, value, wide, backend="flex")
    assert_close(dispatch_attention_fn(query, key, value, narrow, backend="flex"), value.double())


def test_flex_outlives_the_recompile_limit_of_dynamo():
    query, key, value = tensors()
    limit = torch._dynamo.config.recompile_limit
    for reach in range(limit + 2):
        # Each mask_mod has its own constant, which dynamo compiles anew.
        mask = create_block_mask(
            lambda b, h, q, k, reach=reach: (q - k).abs() <= reach, None, None, 24, 24, device="cpu"
        )
        out = dispatch_attention_fn(query, key, value, mask, backend="flex")
        distance = (torch.arange(24)[None] - torch.arange(24)[:, None]).abs()
        assert_close(out, attend(query.double(), key.double(), value.double(), keep=distance <= reach)[0])


@pytest.mark.parametrize(
    "mask",
    [torch.ones(2, 24).bool(), torch.ones(24, 24).bool(), torch.zeros(2, 1, 24, 24), torch.ones(1, 1, 1, 1).bool()],
    ids=["padding", "square", "bias", "one value"],
)
def test_a_mask_that_masks_nothing_does_not_cost_a_kernel(mask):
    query, key, value = tensors()
    assert explain(query, key, value, mask).spec.mask == "none"


def test_a_mask_that_needs_a_gradient_is_kept_even_if_it_is_zero():
    query, key, value = tensors()
    bias = torch.zeros(2, 1, 24, 24, requires_grad=True)
    dispatch_attention_fn(query, key, value, bias).square().sum().backward()
    assert bool(bias.grad.any())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_scales_that_are_not_positive_with_causal_masking(name, scale):
    query, key, value = tensors()
    out = dispatch_attention_fn(query, key, value, is_causal=True, scale=scale, backend=name)
    assert_close(out, attend(query.double(), key.double(), value.double(), is_causal=True, scale=scale)[0])


def test_no_keys_and_half_precision_sums_that_overflow():
    query = torch.full((1, 300, 4, 64), 60.0, dtype=torch.float16)
    assert not bool(dispatch_attention_fn(query, query[:, :0], query[:, :0]).any())
