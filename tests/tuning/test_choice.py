"""What auto takes: the best of given timings, never quantised, never what was found wrong, native where nothing is known."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import attention_dispatch as ad
from attention_dispatch import known_bad, preference
from attention_dispatch.call import canonicalise, spec_of
from attention_dispatch.known_bad import KnownBad
from attention_dispatch.resolve import extent_of
from attention_dispatch.tuning import candidates as candidates_module
from attention_dispatch.tuning import session, store
from attention_dispatch.tuning.choice import measure_call
from attention_dispatch.tuning.measure import Timing, fastest, measure
from attention_dispatch.tuning.store import Extent

from .entries import entry
from .fakes import backend


@pytest.fixture
def tensors():
    return [torch.randn(1, 48, 2, 32) for _ in range(3)]


def call_and_spec(tensors, **arguments):
    call = canonicalise(*tensors, **arguments)
    return call, spec_of(call)


def timer(**given):
    """Timings as given, in microseconds; 1000 for the others."""
    return lambda ways, *_: {name: Timing(given.get(name, 1000.0), 0.0, 5) for name in ways}


def test_auto_takes_the_best_of_fake_timings(tensors):
    call, spec = call_and_spec(tensors)
    found = measure_call(call, spec, timer=timer(native=10.0, _native_flash=5.0))
    assert (found.exact, found.static) == ("_native_flash", "native")
    assert ad.explain(*tensors, backend="auto").backend == "native"
    store.add("cpu", {found.key: session.as_entry(found, spec, [])})
    decision = ad.explain(*tensors, backend="auto")
    assert decision.backend == "_native_flash" and decision.times_us["native"] == 10.0
    with ad.record() as calls:
        ad.dispatch_attention_fn(*tensors, backend="auto")
    assert calls.backends() == {"_native_flash": 1}


def test_a_newcomer_must_win_by_more_than_the_margin_and_the_noise():
    def timings(held, found, spread=0.0):
        return {"native": Timing(held, spread, 9), "other": Timing(found, spread, 9)}

    assert fastest(timings(100.0, 99.0), "native", 0.02) == "native"
    assert fastest(timings(100.0, 97.0), "native", 0.02) == "other"
    assert fastest(timings(100.0, 97.0, spread=10.0), "native", 0.02) == "native"
    assert fastest(timings(100.0, 120.0), "native", 0.02) == "native"


@pytest.mark.parametrize(
    "name, why", [("fake_lie", "relative error"), ("fake_nan", "not finite"), ("fake_raise", "no kernel image")]
)
def test_a_wrong_candidate_is_rejected_by_name_however_fast(name, why, tensors, registered):
    registered(backend(name))
    call, spec = call_and_spec(tensors)
    with pytest.warns(UserWarning, match=f"'{name}' is not considered.*{why}"):
        found = measure_call(call, spec, timer=timer(**{name: 0.001}))
    assert found.exact == "native" and name in found.rejected and name not in found.times


def test_a_candidate_with_wrong_gradients_is_rejected_for_training_only(tensors, registered):
    registered(backend("fake_gradient"))
    fast = timer(fake_gradient=0.001)
    call, spec = call_and_spec(tensors)
    assert measure_call(call, spec, timer=fast).exact == "fake_gradient"
    call, spec = call_and_spec([tensor.requires_grad_() for tensor in tensors])
    with pytest.warns(UserWarning, match="'fake_gradient' is not considered.*gradient of key"):
        found = measure_call(call, spec, timer=fast)
    assert found.exact == "native" and "gradient of key" in found.rejected["fake_gradient"]


def test_auto_never_takes_an_8_bit_backend_and_auto_quantized_does(tensors, registered):
    right = backend("fake_right")
    rows = tuple(replace(row, quantised=True) for row in right.capabilities)
    registered(replace(right, name="fake_8bit", capabilities=rows))
    call, spec = call_and_spec(tensors)
    assert "fake_8bit" not in measure_call(call, spec, timer=timer(fake_8bit=1.0)).times
    found = measure_call(call, spec, quantised=True, timer=timer(fake_8bit=1.0))
    assert (found.exact, found.quantised) == ("native", "fake_8bit")
    store.add("cpu", {found.key: session.as_entry(found, spec, ["fake_8bit"])})
    assert ad.explain(*tensors, backend="auto").backend == "native"
    assert ad.explain(*tensors, backend="auto_quantized").backend == "fake_8bit"


@pytest.mark.parametrize("architecture", ["", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942"])
@pytest.mark.parametrize("mask", ["none", "key_padding", "bool", "bias"])
def test_no_static_order_of_auto_has_an_8_bit_backend_or_lacks_native(architecture, mask):
    tensor = torch.empty(1, 8, 2, 64, dtype=torch.bfloat16)
    spec = spec_of(canonicalise(tensor, tensor, tensor))
    spec = spec._replace(device="cuda" if architecture else "cpu", architecture=architecture, mask=mask)
    names = preference.static_order(spec)
    assert "native" in names and not [name for name in names if ad.registry.get(name).quantised]


def test_only_measured_platforms_claim_a_measurement():
    claims = {name for name, order in preference.ORDERS.items() if order.measured != preference.UNTESTED}
    assert claims == {"sm_90", "cpu"} and all("2026" in preference.ORDERS[name].measured for name in claims)
    for name in ("sm_80", "sm_86", "sm_89", "sm_100", "sm_120", "cpu", "rocm", "npu", "xla"):
        assert not preference.ORDERS[name].plain and preference.ORDERS[name].exact[0] == "native"


def test_what_a_check_found_wrong_is_not_taken_nor_measured(tensors):
    call, spec = call_and_spec(tensors)
    store.add(
        "cpu",
        {store.key(spec, extent_of(call)): entry("_native_flash", native=2.0, _native_flash=1.0)},
        {"_native_flash": {"state": "wrong", "what": "seen", "date": "today"}},
    )
    assert ad.explain(*tensors, backend="auto").backend == "native"
    assert "_native_flash" not in [found.name for found in candidates_module.candidates(spec, False)]
    asked = ad.explain(*tensors, backend="_native_flash")
    assert asked.backend == "_native_flash" and "wrong on today: seen" in str(asked), "a demand is served, with a note"


def test_a_doubtful_backend_comes_last_until_it_was_verified(tensors, monkeypatch):
    doubt = KnownBad(("native",), "note", lambda: True, lambda spec: True, "it is doubtful", "use another.", "url")
    monkeypatch.setattr(known_bad, "KNOWN_BAD", (doubt,))
    _, spec = call_and_spec(tensors)
    assert preference.order(spec)[-1] == "native"
    store.add("cpu", verdicts={"native": {"state": "ok"}})
    assert preference.order(spec)[0] == "native"


def test_a_stored_choice_that_cannot_run_the_call_or_is_gone_is_passed_over(tensors):
    call, spec = call_and_spec(tensors)
    store.add("cpu", {store.key(spec, extent_of(call)): entry("gone", gone=1.0, flash=2.0, _native_flash=3.0)})
    assert ad.explain(*tensors, backend="auto").backend == "_native_flash"


def test_tuning_around_calls_measures_each_kind_once_and_changes_nothing_else(tensors):
    expected = ad.dispatch_attention_fn(*tensors)
    torch.manual_seed(5)
    first = torch.rand(1)
    torch.manual_seed(5)
    with ad.tuning(budget_s=0.001) as tuned:
        for _ in range(2):
            assert torch.equal(ad.dispatch_attention_fn(*tensors), expected)
        ad.dispatch_attention_fn(*tensors, is_causal=True)
    assert torch.equal(torch.rand(1), first), "the caller's random numbers do not shift"
    assert len(tuned.measurements) == 2 and len(store.entries("cpu")) == 2
    with ad.tuning() as again:
        ad.dispatch_attention_fn(*tensors)
    assert again.measurements == []


def test_gradients_are_measured_on_copies(tensors):
    for tensor in tensors:
        tensor.requires_grad_()
    with ad.tuning(budget_s=0.001, save=False) as tuned:
        out = ad.dispatch_attention_fn(*tensors)
    assert all(tensor.grad is None for tensor in tensors)
    out.sum().backward()
    assert tensors[0].grad is not None and "gradients needed" in tuned.measurements[0].call


def test_unsaved_tuning_writes_nothing(tensors, own_store):
    with ad.tuning(budget_s=0.001, save=False):
        ad.dispatch_attention_fn(*tensors)
    assert not own_store.exists() and len(store.entries("cpu")) == 1


def test_measure_ranks_by_time_and_leaves_the_hopeless_early(monkeypatch):
    """On a clock that only the measured functions move, so that a busy machine changes nothing."""
    clock = [0.0]
    monkeypatch.setattr(sys.modules[measure.__module__], "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    counts = {"fast": 0, "close": 0, "slow": 0}

    def taking(name, seconds):
        def run():
            counts[name] += 1
            clock[0] += seconds

        return run

    ways = {"fast": taking("fast", 1e-3), "close": taking("close", 2e-3), "slow": taking("slow", 10e-3)}
    found = measure(ways, torch.device("cpu"), 0.02)
    assert [round(found[name].median_us) for name in ways] == [1000, 2000, 10000]
    # Ten times the best is timed at the first look only; twice the best is not given up.
    assert counts["slow"] == 2
    assert min(found["fast"].samples, found["close"].samples) >= 5


@pytest.mark.parametrize("mask", ["none", "key_padding"])
def test_short_calls_on_an_h100_go_to_native_first(mask):
    _, spec = call_and_spec([torch.randn(1, 8, 1, 64, dtype=torch.bfloat16) for _ in range(3)])
    spec = spec._replace(device="cuda", architecture="sm_90", mask=mask)
    faster = {"none": "_flash_3", "key_padding": "_flash_varlen_3"}[mask]
    for short in (Extent(1, 1024, 1024), Extent(8, 1, 65536), Extent(1, 4095, 4096)):
        assert preference.static_order(spec, lengths=short)[0] == "native"
    for long in (Extent(1, 4096, 4096), Extent(1, 32768, 512)):
        assert preference.static_order(spec, lengths=long)[0] == faster
    assert preference.bucket(Extent(1, 4095, 4096)) != preference.bucket(Extent(1, 4096, 4096))


def test_the_bucket_separates_what_the_orders_separate():
    short, long = Extent(1, 8191, 8191), Extent(1, 8192, 8192)
    assert preference.bucket(short) != preference.bucket(long)
    assert preference.bucket(None) is None


_RANKS = """
import os, sys, torch, torch.distributed as dist
import attention_dispatch as ad
from attention_dispatch.tuning import session, store
from attention_dispatch.kernels.tiles import Tile, TileKey
from attention_dispatch.tuning.measure import Timing
from attention_dispatch.tuning.tiles import TileMeasurement
rank = int(os.fork() == 0)
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=rank, world_size=2)
best = ("_native_flash", "native")[rank]
def timer(ways, *_):
    return {name: Timing(1.0 if name == best else 9.0, 0.0, 5) for name in ways}
original = session.measure_call
session.measure_call = lambda *a, **k: original(*a, **{**k, "timer": timer})
tile, key = Tile((64, 128)[rank], 64, 4, 2), TileKey("flash", "sm_90", "float16", (64, 128)[rank], "plain")
timings = {tile: Timing(1.0, 0.0, 5)}
session.measure_tiles = lambda *a, **k: [TileMeasurement("triton_flash", key, tile, tile, timings, {})]
q = torch.randn(1, 32, 2, 16)
with ad.tuning(tiles=True) as tuned:
    ad.dispatch_attention_fn(q, q, q)
kept = {text: entry["tile"]["block_m"] for text, entry in store.tiles("cpu").items()}
found = [tuned.measurements[0].exact, ad.explain(q, q, q, backend="auto").backend, kept]
everyone = [None, None]
dist.all_gather_object(everyone, found)
dist.destroy_process_group()
if rank == 0:
    os.wait()
    print(everyone)
"""


def test_ranks_that_measured_differently_converge_on_rank_0(tmp_path):
    # One process that forks: both ranks import torch once.
    done = subprocess.run(
        [sys.executable, "-c", _RANKS, str(tmp_path / "meeting")], stdout=subprocess.PIPE, text=True, timeout=60
    )
    tiles = {"flash sm_90 float16 head_dim=64 plain": 64}
    assert done.stdout.strip() == str([["_native_flash", "_native_flash", tiles], ["native", "_native_flash", tiles]])


def test_a_traced_call_follows_the_store(tensors):
    call, spec = call_and_spec(tensors)
    store.add("cpu", {store.key(spec, extent_of(call)): entry("_native_flash", native=2.0, _native_flash=1.0)})
    torch.compiler.reset()
    compiled = torch.compile(
        lambda q, k, v: ad.dispatch_attention_fn(q, k, v, backend="auto"), backend="eager", fullgraph=True
    )
    with ad.record() as calls:
        result = compiled(*tensors)
    torch.testing.assert_close(result, ad.dispatch_attention_fn(*tensors))
    assert calls.records == [] and "_native_flash" in [backend for _, backend in calls.compiled]
