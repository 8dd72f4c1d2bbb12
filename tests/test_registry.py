"""Backends that others bring: what they may be, and that a broken one breaks nothing else."""

from __future__ import annotations

import sys
import types
from dataclasses import replace
from importlib.metadata import EntryPoint

import pytest
import torch

from attention_dispatch import (
    AttentionDispatchError,
    Backend,
    BackendRejectedError,
    BackendUnavailableError,
    InvalidCallError,
    backend_status,
    dispatch_attention_fn,
    explain,
    list_backends,
    register_backend,
    registry,
)
from attention_dispatch.call import AttentionOutput
from attention_dispatch.cli.main import main

X = torch.randn(1, 6, 2, 8, generator=torch.Generator().manual_seed(0))
NATIVE = registry.get("native")


def own(name="mine", **fields):
    return Backend(name, "test", **{"capabilities": NATIVE.capabilities, "forward": NATIVE.forward, **fields})


@pytest.fixture
def installed(monkeypatch):
    """Offers entry points as packages do: ``installed(name=object)`` or ``installed(name="module:OBJECT")``."""

    def install(**backends):
        module = types.ModuleType("plugin_of_the_test")
        entries = []
        for name, backend in backends.items():
            setattr(module, name, backend)
            target = backend if isinstance(backend, str) else f"{module.__name__}:{name}"
            entries.append(EntryPoint(name, target, registry.ENTRY_POINT_GROUP))
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(registry, "entry_points", lambda group: entries)
        monkeypatch.setattr(registry, "_plugins_read", False)
        added.extend(backends)

    added: list[str] = []
    yield install
    for name in added:
        registry.unregister_backend(name.lower())


def test_a_package_brings_its_backend(installed):
    installed(mine=own())
    assert "mine" in list_backends()
    assert torch.equal(dispatch_attention_fn(X, X, X, backend="MINE"), dispatch_attention_fn(X, X, X))


@pytest.mark.parametrize(
    ("broken", "what"),
    [
        ("no_such_package:MINE", "importing no_such_package:MINE failed: ModuleNotFoundError"),
        ("math:pi", "a backend is an attention_dispatch.Backend, got 3.14"),
        ("math:MINE", "has no attribute 'MINE'"),
        (own("other"), "registered as 'mine' calls itself 'other'"),
        (own(capabilities=NATIVE.capabilities[0]), "must be a tuple of Capabilities, got Capabilities"),
        (own(capabilities=()), "must be a tuple of Capabilities"),
    ],
    ids=["no package", "no backend", "no object", "another name", "bare capabilities", "no capabilities"],
)
def test_a_broken_package_is_unavailable_and_breaks_nothing_else(installed, broken, what, capsys):
    installed(mine=broken)
    status = backend_status("mine")
    assert not status.available and what in status.reasons[0].what and status.reasons[0].fix
    with pytest.raises(BackendUnavailableError, match=r"(?s)'mine' is not available.*Do:"):
        dispatch_attention_fn(X, X, X, backend="mine")
    for request in (["mine", "native"], "auto", None):
        dispatch_attention_fn(X, X, X, backend=request)
    refused = {verdict.name: verdict.reasons for verdict in explain(X, X, X).verdicts}
    assert refused["mine"] == status.reasons
    with pytest.raises(InvalidCallError, match="unknown attention_kwargs key 'sharpness'"):
        dispatch_attention_fn(X, X, X, attention_kwargs={"sharpness": 2})
    main(["list"])
    assert "mine" in capsys.readouterr().out


def test_what_extra_reasons_raises_refuses_this_backend_only(installed):
    def fail(spec):
        raise KeyError("sm_90")

    installed(mine=own(extra_reasons=fail))
    with pytest.raises(BackendRejectedError, match="asking for its limits raised KeyError: 'sm_90'") as caught:
        dispatch_attention_fn(X, X, X, backend="mine")
    assert caught.value.codes == ("broken",)
    dispatch_attention_fn(X, X, X, backend=["mine", "native"])
    assert explain(X, X, X).why_not("mine")[0].code == "broken"


@pytest.mark.parametrize("part", ["probe", "load"])
def test_what_a_probe_or_load_raises_is_the_status_and_its_cause(installed, part):
    def fail():
        raise KeyError("LD_LIBRARY_PATH")

    installed(mine=own(**{part: fail}))
    status = backend_status("mine")
    assert [reason.code for reason in status.reasons] == ["import"] and "LD_LIBRARY_PATH" in status.reasons[0].what
    with pytest.raises(BackendUnavailableError) as caught:
        dispatch_attention_fn(X, X, X, backend="mine")
    assert isinstance(caught.value.__cause__, KeyError)
    dispatch_attention_fn(X, X, X, backend=["mine", "native"])
    explain(X, X, X)


@pytest.mark.parametrize("name", ["Mine", "auto", "auto_quantized", "a,b", "a b", "", None, 3])
def test_a_name_nobody_could_ask_for_is_refused(name):
    with pytest.raises(InvalidCallError, match="cannot name a backend"):
        register_backend(own(name))
    assert name not in list_backends()


@pytest.mark.parametrize("backend", ["mine", None, Backend, object()])
def test_what_is_no_backend_is_refused(backend):
    with pytest.raises(InvalidCallError, match=r"a backend is an attention_dispatch\.Backend"):
        register_backend(backend)


def test_what_forward_raises_reaches_the_caller(installed):
    def fail(call):
        raise torch.OutOfMemoryError("CUDA out of memory")

    installed(mine=own(forward=fail))
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            dispatch_attention_fn(X, X, X, backend="mine")


@pytest.mark.parametrize(
    ("forward", "found"),
    [
        (lambda call: None, "returned NoneType, not AttentionOutput"),
        (lambda call: NATIVE.forward(call).out, "returned Tensor, not AttentionOutput"),
        (lambda call: AttentionOutput(call.query[:, :3]), r"returned out \(1, 3, 2, 8\)"),
        (lambda call: AttentionOutput(call.query.double()), r"returned out \(1, 6, 2, 8\) torch.float64"),
        (lambda call: AttentionOutput(call.query, call.query[..., 0]), r"and lse \(1, 6, 2\) torch.float32, the call asks"),
    ],
    ids=["nothing", "a tensor", "another length", "another dtype", "an LSE of another layout"],
)
def test_a_result_of_another_form_is_an_error(installed, forward, found):
    capabilities = tuple(replace(row, lse=True) for row in NATIVE.capabilities)
    installed(mine=own(forward=forward, capabilities=capabilities))
    for _ in range(2):
        with pytest.raises(AttentionDispatchError, match=found):
            dispatch_attention_fn(X, X, X, backend="mine", attention_kwargs={"return_lse": True})
