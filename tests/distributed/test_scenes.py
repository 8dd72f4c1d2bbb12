"""Refusals, failures, registered backends, windows, compilation and models in worlds of two and three processes."""

from __future__ import annotations

import shutil

import pytest

from .worlds import run_world

JOBS = {2: "tests.distributed.scenes:two_ranks", 3: "tests.distributed.scenes:three_ranks"}
EXACT = [(2, name) for name in ("ring backends", "ulysses backends", "ulysses native", "ring windows",
                                "ring windows as masks", "ulysses windows", "agreed once", "model",
                                "model without the attribute", "model of torch", "routed model of torch", "compiled",
                                "compiled models",
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


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
def test_inductor_compiles_ulysses(results):
    for found in results[2]:
        assert isinstance(found["compiled by Inductor"], dict), found["compiled by Inductor"]
        assert max(found["compiled by Inductor"].values()) < 1e-5


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


def test_explain_tells_what_a_call_does_on_every_rank(results):
    for rank, world in enumerate(results[2]):
        assert isinstance(world["explained"], dict), world["explained"]
        ring_text, ring, sent = world["explained"]["ring"]
        assert ring["backend"] == "_native_flash" and ring["tokens"] == [7, 6] and "_native_flash, on every rank" in ring_text
        rows = (7, 6)[rank]
        before = [f"1 x {rows} queries x 7 keys, plain"] if rank else []
        assert sorted(ring["kernel_calls"]) == sorted([f"1 x {rows} queries x {rows} keys, causal", *before])
        # Keys and values of my tokens, padded to 64 elements each, go to the other rank.
        assert ring["sent_bytes"] == 2 * rows * 3 * 8 * 2 * 4 <= sent < ring["sent_bytes"] + 2 * 64 * 4
        _, ulysses, sent = world["explained"]["ulysses"]
        assert ulysses["backend"] == "native" and ulysses["heads"] == [2, 1] and ulysses["sent_bytes"] == sent
        assert world["explained"]["padded"][1]["backend"] is not None
        assert world["explained"]["sage"][1]["backend"] == "reference"


def test_explain_says_why_not(results):
    for world in results[2]:
        text, math, _ = world["explained"]["math"]
        assert math["backend"] is None and "[lse]" in math["error"] and "Not _native_math" in text
        _, nothing, _ = world["explained"]["nothing"]
        assert nothing["backend"] is None and nothing["offers"] == [[], []]
        [sage] = [verdict for verdict in nothing["verdicts"] if verdict["backend"] == "sage"]
        assert sage["reasons"] and all(reason["fix"] for reason in sage["reasons"])


def test_a_ring_inside_a_graph_is_refused(results):
    for found in results[2]:
        assert "use ulysses=N, ring=1, or call the attention outside the compiled region" in found["compiled ring"]
