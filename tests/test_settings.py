"""Whose wish counts, and that every setting is taken back exactly."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F

from attention_dispatch import (
    BackendUnavailableError,
    InvalidCallError,
    UnknownBackendError,
    attention_backend,
    backend_status,
    dispatch_attention_fn,
    explain,
    list_backends,
    register_backend,
    reset_attention_backend,
    scopes,
    set_attention_backend,
)
from attention_dispatch.registry import Backend, get, unregister_backend
from attention_dispatch.request import current, forget_environment, parse

X = torch.randn(1, 6, 2, 8, generator=torch.Generator().manual_seed(0))


class Dispatching(torch.nn.Module):
    _attention_backend = None

    def forward(self, x):
        return dispatch_attention_fn(x, x, x, backend=self._attention_backend)


class Plain(torch.nn.Module):
    def forward(self, x):
        x = x.transpose(1, 2)
        return F.scaled_dot_product_attention(x, x, x).transpose(1, 2)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = Dispatching(), Plain(), Plain()

    def forward(self, x):
        return self.third(self.second(self.first(x)))


@pytest.fixture
def marked():
    """Backends "twice" and "thrice", whose outputs tell who ran: native's, multiplied."""
    native = get("native")

    def backend(name, factor):
        def forward(call):
            out = native.forward(call)
            return out._replace(out=out.out * factor)

        return Backend(name, "test", native.capabilities, forward)

    register_backend(backend("twice", 2.0))
    register_backend(backend("thrice", 3.0))
    yield
    unregister_backend("twice")
    unregister_backend("thrice")


def factor(function, x=X) -> float:
    with attention_backend("native"):
        plain = dispatch_attention_fn(x, x, x)
    return round(float((function(x) / plain).mean()), 3)


def dispatch(x):
    return dispatch_attention_fn(x, x, x)


def test_scopes_nest_and_restore(marked):
    assert factor(dispatch) == 1
    with attention_backend("twice"):
        assert factor(dispatch) == 2
        with attention_backend(["flash", "thrice"]):
            assert factor(dispatch) == 3
        assert factor(dispatch) == 2
    assert factor(dispatch) == 1


def test_an_exception_in_a_scope_restores(marked):
    with pytest.raises(ZeroDivisionError), attention_backend("twice"):
        with pytest.raises(KeyError), attention_backend("thrice"):
            raise KeyError
        assert factor(dispatch) == 2
        raise ZeroDivisionError
    assert factor(dispatch) == 1


def test_an_exception_in_a_routed_forward_restores(marked):
    class Failing(torch.nn.Module):
        def forward(self, x, fail):
            if fail:
                raise ZeroDivisionError
            return F.scaled_dot_product_attention(x, x, x)

    model = Failing()
    set_attention_backend(model, "twice")
    with pytest.raises(ZeroDivisionError):
        model(X, True)
    assert (current.model, current.stack) == (None, [])
    assert factor(dispatch) == 1
    reset_attention_backend(model)


def test_an_environment_that_names_nothing_is_an_error_not_a_crash(monkeypatch):
    dispatch(X)
    dispatch(X)
    monkeypatch.setenv("DIFFUSERS_ATTN_BACKEND", " , ")
    forget_environment()
    with pytest.raises(InvalidCallError, match="DIFFUSERS_ATTN_BACKEND=' , ' names no backend"):
        dispatch(X)


@pytest.mark.parametrize(
    ("value", "error", "says"),
    [("nativ", UnknownBackendError, "Did you mean 'native'"), ("auto,native", InvalidCallError, "stands alone")],
)
@pytest.mark.parametrize("variable", ["ATTENTION_DISPATCH_BACKEND", "DIFFUSERS_ATTN_BACKEND"])
def test_a_wrong_name_in_the_environment_says_which_variable_it_comes_from(variable, value, error, says, monkeypatch):
    monkeypatch.setenv(variable, value)
    forget_environment()
    for _ in range(2):
        with pytest.raises(error, match=f"{says}.*environment variable {variable}"):
            dispatch(X)


class Calling(torch.nn.Module):
    """Calls something in the middle of its forward."""

    def __init__(self, call):
        super().__init__()
        self.call, self.inner = call, Plain()

    def forward(self, x):
        F.scaled_dot_product_attention(x, x, x)
        self.call()
        return self.inner(x)


def test_a_reset_while_the_forward_runs_leaves_nothing_behind(marked):
    model = Calling(lambda: reset_attention_backend(model))
    set_attention_backend(model, "twice")
    set_attention_backend(model, "thrice", include="inner")
    assert factor(model) == 1
    assert (current.model, current.stack, current.effective) == (None, [], None)
    assert factor(dispatch) == 1


def test_a_reset_of_an_outer_module_keeps_the_setting_of_the_one_inside(marked):
    inner = Calling(lambda: reset_scope_of(outer))
    outer = torch.nn.Sequential(inner)
    outer.forward = lambda x: F.scaled_dot_product_attention(x, x, x) * 0 + inner(x)

    def reset_scope_of(module):
        scopes.remove_scope(module)

    scopes.set_scope(outer, parse("twice"))
    scopes.set_scope(inner, parse("thrice"))
    assert factor(outer) == 3
    assert (current.model, current.stack) == (None, [])
    scopes.remove_scope(inner)


def test_a_reset_by_another_thread_while_the_forward_runs(marked):
    running, reset = threading.Event(), threading.Event()
    model = Calling(lambda: (running.set(), reset.wait(20)))
    set_attention_backend(model, "twice")
    found = {}

    def work():
        found["forward"] = factor(model)
        found["left"] = (current.model, list(current.stack), factor(dispatch))

    thread = threading.Thread(target=work)
    thread.start()
    assert running.wait(20)
    reset_attention_backend(model)
    reset.set()
    thread.join(20)
    assert found == {"forward": 1, "left": (None, [], 1)}


def test_the_nearest_setting_counts(marked, monkeypatch):
    model = Dispatching()
    with attention_backend("twice"):
        assert factor(model) == 2
        set_attention_backend(model, "thrice")
        assert factor(model) == 3
        assert factor(lambda x: dispatch_attention_fn(x, x, x, backend="native")) == 1
        reset_attention_backend(model)
        assert factor(model) == 2
    assert factor(model) == 1


def test_settings_by_pattern_and_their_report(marked):
    model = Model()
    report = set_attention_backend(model, {"*": "twice", "third": "thrice"}, exclude="second")
    assert report.routed == (("first", "'twice'"), ("third", "'thrice'"))
    assert report.left == (("second", "in exclude"),)
    assert [factor(part) for part in (model.first, model.second, model.third)] == [2, 1, 3]
    reset_attention_backend(model)
    assert [factor(part) for part in (model.first, model.second, model.third)] == [1, 1, 1]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (({"first": "native", "second": "nobody"},), UnknownBackendError),
        (({"first": "native", "fourth": "native"},), InvalidCallError),
        (({"first": "native", "second": ["native", "auto"]},), InvalidCallError),
        (({},), InvalidCallError),
    ],
)
def test_everything_is_checked_before_anything_is_changed(arguments, error):
    model = Model()
    before = [dict(vars(part)) for part in model.modules()]
    original = F.scaled_dot_product_attention
    with pytest.raises(error):
        set_attention_backend(model, *arguments)
    assert [dict(vars(part)) for part in model.modules()] == before
    assert F.scaled_dot_product_attention is original


def test_a_backend_that_is_missing_here_is_refused_before_anything_is_changed():
    missing = next((name for name in list_backends() if not backend_status(name).available), None)
    if missing is None:
        pytest.skip("every registered backend is available here")
    model = Model()
    with pytest.raises(BackendUnavailableError):
        set_attention_backend(model, {"first": "native", "second": missing})
    assert model.first._attention_backend is None


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_copies_carry_the_setting_and_are_independent(duplicate, marked):
    original = F.scaled_dot_product_attention
    model = Model()
    set_attention_backend(model, "twice")
    other = duplicate(model)
    reset_attention_backend(model)
    assert [factor(part) for part in (model.first, model.second)] == [1, 1]
    assert [factor(part) for part in (other.first, other.second)] == [2, 2]
    set_attention_backend(other, "thrice")
    assert [factor(part) for part in (other.first, other.second)] == [3, 3]
    reset_attention_backend(other)
    assert [factor(part) for part in (other.first, other.second)] == [1, 1]
    assert F.scaled_dot_product_attention is original


def test_setting_and_resetting_twice_is_like_once(marked):
    model = Model()
    before = [set(vars(part)) for part in model.modules()]
    set_attention_backend(model, "twice")
    set_attention_backend(model, "thrice")
    assert factor(model.second) == 3
    reset_attention_backend(model)
    reset_attention_backend(model)
    assert [set(vars(part)) for part in model.modules()] == before
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


def test_replacing_a_backend_forgets_how_it_was_called(marked):
    """Calls seen before take a shorter way; a new object of the name must not be passed over."""
    native = get("native")
    for multiple in (5.0, 7.0):

        def forward(call, multiple=multiple):
            out = native.forward(call)
            return out._replace(out=out.out * multiple)

        def bind(call, multiple=multiple):
            run = native.bind(call)
            return lambda query, key, value: run(query, key, value) * multiple

        register_backend(Backend("twice", "test", native.capabilities, forward, bind=bind), replace=True)
        for _ in range(3):
            assert factor(lambda x: dispatch_attention_fn(x, x, x, backend="twice")) == multiple


def test_auto_is_never_quantised():
    for device in ("cpu", "cuda"):
        decision = explain(X.to(torch.float16), X.to(torch.float16), X.to(torch.float16), backend="auto", device=device)
        assert decision.backend is not None and not get(decision.backend).quantised


def test_a_sequence_names_every_refusal_if_none_is_left():
    decision = explain(X, X, X, dropout_p=0.5, backend=["flex", "_native_flash"])
    assert decision.backend is None
    assert "flex" in decision.error and "_native_flash" in decision.error and "dropout" in decision.error
