"""Parts that need no process group: layouts, blocks, merging, head assignment, mask readings, the cost model."""

from __future__ import annotations

import itertools

import pytest
import torch

from attention_dispatch.distributed import BlockCall, exact_backward, plan_parallelism
from attention_dispatch.distributed.blocks import plan_blocks, tile_band
from attention_dispatch.distributed.exchange import assign_heads, chunk_heads
from attention_dispatch.distributed.merge import RunningAttention, merge_attention
from attention_dispatch.distributed.positions import contiguous, even_lengths, head_tail
from attention_dispatch.distributed.sharded_mask import read_masks
from attention_dispatch.errors import InvalidCallError

from .oracle import attention

LAYOUTS = [contiguous(even_lengths(13, 3)), contiguous((7, 0, 6)), head_tail(13, 3), head_tail(24, 4),
           head_tail(13, 4).joined([[0, 1], [2, 3]])]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_hold_every_token_once(layout):
    tokens = [token for ranges in layout.ranges for start, stop in ranges for token in range(start, stop)]
    assert sorted(tokens) == list(range(layout.total))
    in_order = [list(layout.ranges[rank]) for rank in range(layout.world)]
    assert all(ranges == sorted(ranges) for ranges in in_order)


def seen_by_blocks(blocks, rows, columns):
    count = torch.zeros(rows, columns, dtype=torch.int)
    for block in blocks:
        count[block.queries, block.keys] += block.visible("cpu").int()
    return count


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", [(-1, -1), (3, -1), (2, 1), (0, 0), (-1, 2), (30, 0)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_blocks_cover_each_visible_pair_once(layout, window, is_causal):
    for queries, keys in itertools.product(layout.ranges, repeat=2):
        i = torch.tensor([t for a, b in queries for t in range(a, b)], dtype=torch.long)[:, None]
        j = torch.tensor([t for a, b in keys for t in range(a, b)], dtype=torch.long)[None]
        wanted = torch.ones(i.shape[0], j.shape[1], dtype=torch.bool)
        right = 0 if is_causal else window[1]
        if window[0] >= 0:
            wanted &= j >= i - window[0]
        if right >= 0:
            wanted &= j <= i + right
        blocks = plan_blocks(queries, keys, is_causal, window)
        assert torch.equal(seen_by_blocks(blocks, *wanted.shape), wanted.int())
        for block in blocks:
            assert not block.is_causal or block.shape[0] == block.shape[1]
            assert min(block.window) >= -1
            if block.window != (-1, -1):
                tiles = tile_band(block)
                assert torch.equal(seen_by_blocks(tiles, *wanted.shape), seen_by_blocks([block], *wanted.shape))


def test_a_balanced_ring_step_is_one_plain_call():
    layout = head_tail(64, 4)
    for query_rank, key_rank in itertools.product(range(4), repeat=2):
        blocks = plan_blocks(layout.ranges[query_rank], layout.ranges[key_rank], True, (-1, -1))
        assert len(blocks) == 1
        assert blocks[0].is_causal == (query_rank == key_rank)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_is_exact_for_huge_scores_and_empty_rows(dtype):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 9, 2, 8, dtype=torch.float64) * factor for factor in (60, 60, 1))
    mask = torch.rand(1, 2, 9, 9) > 0.3
    mask[:, :, 0], mask[:, :, 1, :4] = False, False
    want, want_lse = attention(q, k, v, mask)
    parts = [attention(q, k[:, part], v[:, part], mask[..., part]) for part in (slice(0, 4), slice(4, 9))]
    (a, lse_a), (b, lse_b) = parts
    out, lse = merge_attention(a.to(dtype), lse_a.float(), b.to(dtype), lse_b.float())
    limit = 1e-5 if dtype == torch.float32 else 1e-2
    assert not out.isnan().any() and torch.all(out[:, 0] == 0) and torch.all(lse[:, :, 0] == -torch.inf)
    assert (out - want).norm() / want.norm() < limit
    assert (lse - want_lse)[:, :, 1:].abs().max() < 1e-3
    for into in (None, (torch.empty_like(want), torch.empty_like(want_lse))):
        for is_last in (False, True):
            running = RunningAttention(9, into)
            for index, (part_out, part_lse) in enumerate(parts):
                running.add(slice(0, 9), part_out, part_lse, is_last and index == 1)
            total, total_lse = running.result()
            assert torch.allclose(total, want) and torch.allclose(total_lse, want_lse)
            assert into is None or total is into[0]


@pytest.mark.parametrize("heads, kv_heads, world", [(6, 6, 4), (6, 2, 3), (8, 1, 3), (2, 1, 3), (24, 8, 16), (4, 4, 1)])
def test_every_head_is_computed_once_with_its_own_keys(heads, kv_heads, world):
    assigned = assign_heads(heads, kv_heads, world)
    assert len(assigned) == world
    assert [h for rank in assigned for h in range(*rank.queries)] == list(range(heads))
    for rank in assigned:
        needed = {h // (heads // kv_heads) for h in range(*rank.queries)}
        assert needed == set(range(*rank.keys))
    for rank, chunks in zip(assigned, zip(*chunk_heads(assigned, 2))):
        assert [h for chunk in chunks for h in range(*chunk.queries)] == list(range(*rank.queries))


def test_mask_readings():
    q, k = contiguous((4, 5)), contiguous((6, 7))
    assert read_masks([(2, 6), (2, 7)], 2, 3, q, k)[0]
    assert read_masks([(2, 13)] * 2, 2, 3, q, k)[0]
    assert read_masks([(4, 13), (5, 13)], 2, 3, q, k) == (False, "local", "global")
    assert read_masks([(2, 3, 9, 13)] * 2, 2, 3, q, k) == (False, "global", "global")
    assert read_masks([(2, 1, 1, 6), (2, 1, 1, 7)], 2, 3, q, k) == (False, "broadcast", "local")
    for sizes in ([(9, 13)] * 2, [(2, 2, 4, 6), (2, 2, 5, 7)], [(1, 1, 4, 6), (1, 1, 5, 7)], [(2, 5)] * 2):
        with pytest.raises(InvalidCallError):
            read_masks(sizes, 9, 3, q, k)


def test_exact_backward_matches_autograd_in_row_blocks(monkeypatch):
    monkeypatch.setattr("attention_dispatch.distributed.pair._BACKWARD_SCORES", 200)
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 9, heads, 4, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))
    bias = torch.randn(1, 4, 9, 9, dtype=torch.float64)
    out, lse = attention(q, k, v, bias, is_causal=True, window=(5, -1), softcap=2.0, scale=0.4)
    grad = torch.randn_like(out)
    wanted = torch.autograd.grad(out, (q, k, v), grad)
    call = BlockCall(bias, "bias", True, (5, -1), 0.4, 2.0)
    found = exact_backward(grad, q.detach(), k.detach(), v.detach(), out.detach(), lse.detach(), call)
    for one, want in zip(found, wanted):
        assert torch.allclose(one, want)


@pytest.mark.parametrize("size", [1, 2, 7, 64, 1024])
def test_planned_degrees_fill_the_mesh_and_are_the_fastest(size):
    plan = plan_parallelism(1 << 20, 24, 8, size, is_causal=True)
    assert plan.ring * plan.ulysses == size
    assert plan.estimates[0].total_s == min(one.total_s for one in plan.estimates)
    assert f"ring={plan.ring}" in str(plan)
