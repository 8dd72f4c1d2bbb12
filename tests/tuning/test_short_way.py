"""The remembered way of auto and of permissions is as short as a demand's, and never stale."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch

import attention_dispatch as ad
from attention_dispatch import api, resolve
from attention_dispatch.call import canonicalise, spec_of
from attention_dispatch.registry import get
from attention_dispatch.resolve import extent_of
from attention_dispatch.tuning import health, store

from .entries import entry
from .fakes import backend


@pytest.fixture(autouse=True)
def nothing_remembered():
    api._bound.clear()
    yield
    api._bound.clear()


@pytest.fixture
def tensors():
    return [torch.randn(1, 16, 2, 8) for _ in range(3)]


@pytest.fixture
def long_ways(monkeypatch):
    """One entry for every call that took the long way."""
    seen = []
    original = api._canonical
    monkeypatch.setattr(api, "_canonical", lambda *arguments: (seen.append(1), original(*arguments))[1])
    return seen


@pytest.fixture
def ran(registered):
    """Names of the backends that ran, in order; for three that compute the right result."""
    names: list[str] = []

    def add(name: str) -> None:
        right = backend("fake_right")

        def forward(call):
            names.append(name)
            return right.forward(call)

        registered(right.__class__(name, "fakes", right.capabilities, forward))

    for name in ("one", "two", "three"):
        add(name)
    return names


def choose(tensors, exact, **arguments):
    call = canonicalise(*tensors, **arguments)
    store.add("cpu", {store.key(spec_of(call), extent_of(call)): entry(exact, **{exact: 1.0})})


@pytest.mark.parametrize("request_", ["auto", ("one", "native"), "triton_flash", "reference"])
def test_the_second_call_takes_the_short_way(request_, tensors, ran, long_ways):
    if request_ == "triton_flash":
        pytest.importorskip("triton", reason="needs triton")
        if not ad.backend_status("triton_flash").available:
            pytest.skip("triton_flash needs a GPU or the interpreter")
    first = ad.dispatch_attention_fn(*tensors, backend=request_)
    for _ in range(3):
        assert torch.equal(ad.dispatch_attention_fn(*tensors, backend=request_), first)
    assert len(long_ways) == 1


@pytest.mark.parametrize("request_", ["auto", ["one", "native"], "native", "reference"])
def test_calls_with_a_mask_take_it_too(request_, tensors, ran, long_ways):
    mask = torch.rand(1, 1, 16, 16) > 0.3
    first = ad.dispatch_attention_fn(*tensors, mask, backend=request_)
    assert torch.equal(ad.dispatch_attention_fn(*tensors, mask, backend=request_), first)
    assert len(long_ways) == 1


def _masks():
    keep = torch.rand(1, 1, 16, 16) > 0.3
    lower = torch.ones(1, 1, 16, 16, dtype=torch.bool).tril()
    return {
        "another": lower,
        "changed in place": keep.clone(),
        "all True": torch.ones(1, 1, 16, 16, dtype=torch.bool),
        "expanded keys": (torch.arange(16) < 9)[None, None, None].expand(1, 1, 16, 16),
        "additive": torch.randn(1, 1, 16, 16),
        "per head": torch.rand(1, 2, 16, 16) > 0.3,
        "trained": torch.randn(1, 1, 16, 16, requires_grad=True),
        "wrong rows": torch.zeros(1, 1, 16, 16).bool(),
    }


@pytest.mark.parametrize("name", _masks())
@pytest.mark.parametrize("request_", ["auto", "native"])
def test_a_short_way_serves_only_masks_like_the_one_decided_on(request_, name, tensors):
    mask = _masks()[name]
    kept = torch.rand(1, 1, 16, 16) > 0.3
    for known in (kept, torch.randn(1, 1, 16, 16)):
        for _ in range(2):
            ad.dispatch_attention_fn(*tensors, known, backend=request_)
    if name == "changed in place":
        mask.copy_(kept)
        ad.dispatch_attention_fn(*tensors, mask, backend=request_)
        mask[..., 3:] = False
    out = ad.dispatch_attention_fn(*tensors, mask, backend=request_)
    expected = ad.dispatch_attention_fn(*(x.double() for x in tensors), mask, backend="reference")
    torch.testing.assert_close(out.double(), expected, atol=1e-6, rtol=1e-5)
    if name == "trained":
        (gradient,) = torch.autograd.grad(out.sum(), mask)
        assert gradient.abs().max() > 0


@pytest.mark.parametrize("then", ["expanded keys", "trained"])
def test_a_mask_of_the_same_shape_that_a_kernel_cannot_take_goes_to_another(then, tensors, registered):
    """Padding that was expanded, and a mask that is trained, look like the bool and the additive mask seen before."""
    right, calls = backend("fake_right"), []

    def forward(call):
        calls.append(call.mask.kind)
        return right.forward(call)

    [row] = right.capabilities
    limited = replace(row, masks=frozenset({"bool", "bias"}), mask_gradients=False)
    registered(replace(right, name="limited", capabilities=(limited,), forward=forward))
    known = torch.rand(1, 1, 16, 16) > 0.3 if then == "expanded keys" else torch.randn(1, 1, 16, 16)
    for _ in range(2):
        ad.dispatch_attention_fn(*tensors, known, backend=["limited", "native"])
    assert len(calls) == 2
    ad.dispatch_attention_fn(*tensors, _masks()[then], backend=["limited", "native"])
    assert len(calls) == 2


@pytest.mark.parametrize("masked", [False, True])
def test_tensors_that_a_shape_does_not_tell_apart_are_checked_again(masked, tensors, registered):
    """A kernel that trusts its arguments must get neither mixed dtypes nor a last dimension with gaps."""
    right, strides = backend("fake_right"), []

    def forward(call):
        strides.append({tensor.stride(3) for tensor in (call.query, call.key, call.value)})
        return right.forward(call)

    registered(replace(right, name="trusting", forward=forward))
    mask = torch.rand(1, 1, 16, 16) > 0.3 if masked else None
    for _ in range(2):
        out = ad.dispatch_attention_fn(*tensors, mask, backend="trusting")
    query, key, value = tensors
    with pytest.raises(ad.InvalidCallError, match="share one dtype"):
        ad.dispatch_attention_fn(query, key.double(), value, mask, backend="trusting")
    gaps = torch.stack([key, key], dim=-1)[..., 0]
    assert torch.equal(ad.dispatch_attention_fn(query, gaps, value, mask, backend="trusting"), out)
    assert strides == [{1}] * 3


def test_a_wrong_mask_is_refused_after_a_right_one(tensors):
    mask = torch.ones(1, 16, dtype=torch.bool).tril()
    for _ in range(2):
        ad.dispatch_attention_fn(*tensors, mask)
    with pytest.raises(ad.InvalidCallError, match="attn_mask"):
        ad.dispatch_attention_fn(*tensors, torch.ones(1, 15, dtype=torch.bool))
    with pytest.raises(ad.InvalidCallError, match="head_dim"):
        ad.dispatch_attention_fn(tensors[0], tensors[1][..., :4], tensors[2], mask)


def test_a_new_measurement_counts_at_the_next_call(tensors, ran):
    for name in ("one", "two", "three"):
        choose(tensors, name)
        for _ in range(2):
            ad.dispatch_attention_fn(*tensors, backend="auto")
    assert ran == ["one", "one", "two", "two", "three", "three"]


def test_tuning_counts_at_the_next_call(tensors, ran, monkeypatch):
    from attention_dispatch.tuning import session
    from attention_dispatch.tuning.measure import Timing

    choose(tensors, "one")
    ad.dispatch_attention_fn(*tensors, backend="auto")
    original = session.measure_call
    timer = lambda ways, *_: {name: Timing(1.0 if name == "two" else 9.0, 0.0, 5) for name in ways}  # noqa: E731
    monkeypatch.setattr(session, "measure_call", lambda *a, **k: original(*a, **{**k, "timer": timer}))
    with ad.tuning(again=True):
        ad.dispatch_attention_fn(*tensors, backend="auto")
    ran.clear()
    ad.dispatch_attention_fn(*tensors, backend="auto")
    assert ran == ["two"]


def test_a_verdict_counts_at_the_next_call(tensors, ran):
    choose(tensors, "one")
    for _ in range(2):
        ad.dispatch_attention_fn(*tensors, backend="auto")
    health.remember([health.Health("one", "wrong", "a case")], "cpu")
    ad.dispatch_attention_fn(*tensors, backend="auto")
    assert ran == ["one", "one"]
    health.remember([health.Health("one", "ok")], "cpu")
    ad.dispatch_attention_fn(*tensors, backend="auto")
    assert ran == ["one", "one", "one"]


def test_clearing_and_reloading_the_store_counts(tensors, ran):
    choose(tensors, "one")
    for _ in range(2):
        ad.dispatch_attention_fn(*tensors, backend="auto")
    store.clear()
    ad.dispatch_attention_fn(*tensors, backend="auto")
    assert ran == ["one", "one"]


def test_gradients_strides_and_autocast_have_choices_of_their_own(tensors, ran):
    choose(tensors, "one")
    views = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in tensors]
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    halves = [tensor.bfloat16() for tensor in tensors]
    choose(views, "two")
    choose(leaves, "three")
    choose(halves, "two")
    for _ in range(3):
        ad.dispatch_attention_fn(*tensors, backend="auto")
        ad.dispatch_attention_fn(*views, backend="auto")
        ad.dispatch_attention_fn(*leaves, backend="auto")
        with torch.no_grad():
            ad.dispatch_attention_fn(*leaves, backend="auto")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ad.dispatch_attention_fn(*tensors, backend="auto")
    assert ran == ["one", "two", "three", "one", "two"] * 3


def test_forward_only_backends_are_not_taken_for_training(tensors, registered):
    from dataclasses import replace

    right = backend("fake_right")
    rows = tuple(replace(row, gradients=False, mask_gradients=False) for row in right.capabilities)
    registered(replace(right, name="forward_only", capabilities=rows))
    for _ in range(2):
        ad.dispatch_attention_fn(*tensors, backend="forward_only")
        ad.dispatch_attention_fn(*tensors, backend=("forward_only", "native"))
    for tensor in tensors:
        tensor.requires_grad_()
    with pytest.raises(ad.BackendRejectedError, match="gradients"):
        ad.dispatch_attention_fn(*tensors, backend="forward_only")
    out = ad.dispatch_attention_fn(*tensors, backend=("forward_only", "native"))
    assert out.requires_grad


def test_mistakes_that_a_shape_does_not_show_are_still_told(tensors, ran):
    query, key, value = tensors
    for request in ("auto", "one"):
        for _ in range(2):
            ad.dispatch_attention_fn(*tensors, backend=request)
        with pytest.raises(ad.InvalidCallError, match="one dtype"):
            ad.dispatch_attention_fn(query, key.double(), value, backend=request)
        with pytest.raises(ad.InvalidCallError, match="one device"):
            ad.dispatch_attention_fn(query, key, value.to("meta"), backend=request)


def test_a_kernel_that_needs_dense_rows_gets_them(tensors, registered):
    right = backend("fake_right")

    def forward(call):
        assert all(tensor.stride(3) == 1 for tensor in (call.query, call.key, call.value))
        return right.forward(call)

    registered(right.__class__("needs_rows", "fakes", right.capabilities, forward))
    wide = [torch.stack([tensor, tensor], dim=-1)[..., 0] for tensor in tensors]
    expected = ad.dispatch_attention_fn(*tensors, backend="needs_rows")
    for _ in range(2):
        ad.dispatch_attention_fn(*tensors, backend="needs_rows")
        torch.testing.assert_close(ad.dispatch_attention_fn(*wide, backend="needs_rows"), expected)


@pytest.mark.parametrize("memory", ["plans", "bound"])
def test_a_decision_that_another_thread_overtook_is_not_remembered(memory, tensors, ran, monkeypatch):
    """The store changes after the choice was made from it, and before it is remembered."""
    choose(tensors, "one")
    place = resolve if memory == "plans" else api
    name = "_resolve" if memory == "plans" else "short_way"
    original = getattr(place, name)

    def overtaken(*arguments):
        found = original(*arguments)
        other = threading.Thread(target=choose, args=(tensors, "two"))
        other.start()
        other.join()
        return found

    monkeypatch.setattr(place, name, overtaken)
    ad.dispatch_attention_fn(*tensors, backend="auto")
    monkeypatch.setattr(place, name, original)
    ad.dispatch_attention_fn(*tensors, backend="auto")
    assert ran == ["one", "two"]


def test_recording_sees_what_was_remembered(tensors, ran):
    choose(tensors, "one")
    for _ in range(2):
        ad.dispatch_attention_fn(*tensors, backend="auto")
    with ad.record() as calls:
        ad.dispatch_attention_fn(*tensors, backend="auto")
    assert calls.backends() == {"one": 1}


def test_a_kernel_of_ours_gets_the_arguments_it_was_remembered_with(tensors):
    expected = ad.dispatch_attention_fn(*tensors, is_causal=True, scale=0.3, backend="reference")
    for _ in range(2):
        assert torch.equal(
            ad.dispatch_attention_fn(*tensors, is_causal=True, scale=0.3, backend="reference"), expected
        )
    assert get("reference").bind is None, "else this tests nothing"
