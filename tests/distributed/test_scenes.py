"""Refusals, failures, registered backends, windows, compilation and models in worlds of two and three processes."""

from __future__ import annotations

import pytest

from .worlds import run_world

JOBS = {2: "tests.distributed.scenes:two_ranks", 3: "tests.distributed.scenes:three_ranks"}
EXACT = [(2, name) for name in ("ring backends", "ulysses backends", "ulysses native", "ring windows",
                                "ring windows as masks", "ulysses windows", "agreed once", "model",
                                "model without the attribute", "model of torch", "routed model of torch", "compiled",
                                "few tokens")]
EXACT += [(3, name) for name in ("ring windows", "uneven heads", "fewer heads than ranks", "fewer tokens than ranks",
                                 "gather")]
REFUSED = {
    "dropout": ("InvalidCallError", "dropout_p"),
    "mask kind": ("BackendRejectedError", "[mask]"),
    "padding": ("BackendRejectedError", "key_padding mask"),
    "gradients": ("BackendRejectedError", "[gradients]"),
    "local rows and keys": ("InvalidCallError", "against all keys"),
    "causal differs": ("InvalidCallError", "is_causal differs"),
    "quantised name": ("BackendUnavailableError", "sage"),
    "no lse": ("BackendRejectedError", "[lse]"),
    "option": ("InvalidCallError", "smooth_k"),
    "degrees": ("InvalidCallError", "plan_parallelism"),
    "not set up": ("InvalidCallError", "enable_parallelism"),
    "no attention": ("InvalidCallError", "no module of it computes attention"),
    "hidden attention": ("InvalidCallError", "self_attn: nn.MultiheadAttention may compute attention by hand"),
    "block mask": ("InvalidCallError", "cannot be divided"),
}


@pytest.fixture(scope="module")
def results():
    return {world: run_world(world, job) for world, job in JOBS.items()}


@pytest.mark.parametrize("world, scene", EXACT)
def test_equals_one_process(results, world, scene):
    for rank, found in enumerate(results[world]):
        assert isinstance(found[scene], dict), f"rank {rank}: {found[scene]}"
        assert max(found[scene].values()) < 1e-5, f"rank {rank}: {found[scene]}"


@pytest.mark.parametrize("case", REFUSED)
def test_refused_alike_on_every_rank(results, case):
    kind, words = REFUSED[case]
    for found in results[2]:
        text = found["refusals"][case]
        assert text.startswith(kind) and words in text, text


def test_wrong_shapes_on_one_rank_stop_the_other(results):
    good, bad = (found["refusals"]["one rank's shapes"] for found in results[2])
    assert bad.startswith("InvalidCallError")
    assert good.startswith("PeerError") and "rank 1: InvalidCallError" in good


def test_nothing_is_computed_for_a_refused_call_and_ranks_stay_in_step(results):
    for found in results[2]:
        assert found["refusals"]["sent"] == "0"
        assert float(found["refusals"]["after"]) < 1e-5


@pytest.mark.parametrize("world", [2, 3])
def test_a_failing_rank_raises_everywhere_at_once(results, world):
    for rank, found in enumerate(results[world]):
        assert len(found["failures"]) == 4
        for text, seconds in found["failures"].values():
            assert seconds < 5
            if rank == world - 1:
                assert text.startswith("MemoryError"), text
            else:
                assert text.startswith("PeerError") and f"rank {world - 1}: MemoryError" in text, text


def test_an_absent_rank_is_noticed_after_the_timeout(results):
    seconds, _, text = results[2][0]["absent"].partition(" ")
    assert 1.5 < float(seconds) < 4
    assert "RuntimeError" in text.split("\n")[0]


@pytest.mark.parametrize("world", [2, 3])
def test_a_ring_attends_to_one_shard_at_a_time(results, world):
    for found in results[world]:
        assert found["resident"]["keys"] == 24 // world
        assert found["resident"]["calls"] == world


@pytest.mark.parametrize("world", [2, 3])
def test_head_tail_gives_every_rank_the_same_causal_work(results, world):
    work = {found["resident"]["work"] for found in results[world]}
    assert work == {24 * 24 // 2 // world}


def test_a_config_of_diffusers_is_read_by_its_attributes(results):
    for found in results[2]:
        assert found["foreign"]["out"] < 1e-5
        assert found["foreign"]["none"] is None
