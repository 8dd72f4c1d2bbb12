"""FlashAttention 4 reads masks that depend on the query where they lie, in and outside a graph, or refuses the call."""

from __future__ import annotations

import pytest
import torch
from family_rows import BACKENDS

from attention_dispatch import dispatch_attention_fn
from attention_dispatch.backends.reference import attention
from attention_dispatch.call import canonicalise, spec_of
from attention_dispatch.capabilities import reasons_against

RECORD = "flash_attn_4-4.0.0b36"
BATCH, HEADS, LENGTH = 2, 4, 7


def tensors(kv_heads=HEADS, batch=BATCH, length=LENGTH):
    generator = torch.Generator().manual_seed(0)
    shapes = (batch, length, HEADS, 64), *[(batch, length, kv_heads, 64)] * 2
    return [torch.randn(shape, generator=generator).to(torch.bfloat16) for shape in shapes]


def random_mask(kind, *shape):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return values > -0.5 if kind == "bool" else values


def by_distance(kind):
    """(1, 1, Q, K) whose values depend on K + Q alone, as a view of 2 * LENGTH - 1 values: two axes of stride 1."""
    return random_mask(kind, 2 * LENGTH - 1).as_strided((1, 1, LENGTH, LENGTH), (1, 1, 1, 1))


def check(mask, run=dispatch_attention_fn, **shapes):
    query, key, value = tensors(**shapes)
    kwargs = {"enable_gqa": True, "attention_kwargs": {"return_lse": True}}
    with torch.no_grad():
        out, lse = run(query, key, value, mask, backend="flash_4", **kwargs)
    expected = attention(canonicalise(query, key, value, mask, **kwargs))
    assert torch.allclose(out.double(), expected.out.double(), atol=2e-2, rtol=2e-2)
    assert torch.allclose(lse.double(), expected.lse.double(), atol=2e-2, rtol=2e-2)
    return lse


@pytest.mark.parametrize("kind", ["bool", "bias"])
@pytest.mark.parametrize("shape", [(1, 1, LENGTH, LENGTH), (BATCH, 1, LENGTH, LENGTH), (1, HEADS, LENGTH, LENGTH)])
def test_a_broadcast_mask_is_read_where_it_lies(kind, shape, on_cpu):
    _, calls = on_cpu("flash_4", RECORD)
    mask = random_mask(kind, *shape)
    check(mask)
    [read] = calls.calls[-1][1]["aux_tensors"]
    assert read.shape == (BATCH, HEADS, LENGTH, LENGTH)
    assert read.data_ptr() == mask.data_ptr()
    assert [stride == 0 for stride in read.stride()] == [size == 1 for size in shape]


@pytest.mark.parametrize("kind", ["bool", "bias"])
@pytest.mark.parametrize("batch", [1, BATCH])
def test_views_without_a_single_axis_of_stride_1(kind, batch, on_cpu):
    on_cpu("flash_4", RECORD)
    check(by_distance(kind), batch=batch)
    check(random_mask(kind, 1, 1, LENGTH, LENGTH).mT, batch=batch)
    check(random_mask(kind, 1, 1, LENGTH, 2 * LENGTH)[..., ::2], batch=batch)
    check(random_mask(kind, 1, 1, 1, 1).fill_(1), batch=1, length=1)


@pytest.mark.parametrize("kind", ["bool", "bias"])
def test_heads_that_share_keys_have_masks_of_their_own(kind, on_cpu):
    on_cpu("flash_4", RECORD)
    mask = random_mask(kind, BATCH, HEADS, LENGTH, LENGTH)
    mask[1, 2, 3] = False if kind == "bool" else float("-inf")
    lse = check(mask, kv_heads=2)
    assert lse[1, 2, 3] == float("-inf") and int(lse.isinf().sum()) == 1


@pytest.mark.parametrize("kind", ["bool", "bias"])
def test_masks_in_a_graph(kind, on_cpu):
    on_cpu("flash_4", RECORD)
    torch.compiler.reset()
    check(
        random_mask(kind, 1, HEADS, LENGTH, LENGTH),
        torch.compile(dispatch_attention_fn, fullgraph=True, backend="eager"),
    )
    torch.compiler.reset()


def refusals(kind, architecture="sm_90", **changed):
    spec = spec_of(canonicalise(*tensors(), random_mask(kind, 1, 1, LENGTH, LENGTH)))
    spec = spec._replace(device="cuda", architecture=architecture, **changed)
    backend = BACKENDS["flash_4"]
    reasons = (*reasons_against(backend.capabilities, spec), *backend.extra_reasons(spec))
    assert all(reason.fix for reason in reasons)
    return {reason.code for reason in reasons}


@pytest.mark.parametrize("kind", ["bool", "bias"])
def test_what_does_not_go_with_such_a_mask(kind):
    assert refusals(kind) == set()
    assert refusals(kind, grad=True) == {"grad"}
    assert "window" in refusals(kind, window=True)
    assert refusals(kind, architecture="sm_100") == {"mask"}
    assert refusals(kind, softcap=True) == ({"softcap"} if kind == "bias" else set())
