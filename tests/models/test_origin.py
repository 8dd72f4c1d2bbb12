"""explain says whose wish a request was."""

import json

import pytest
import torch
import torch.nn as nn

import attention_dispatch as ad
from attention_dispatch import policies
from attention_dispatch.errors import InvalidCallError
from attention_dispatch.request import forget_environment

from .blocks import DIM, CrossModel, ExtraTail

Q = torch.empty(1, 4, 2, 8)


class Asks(nn.Module):
    """A module that dispatches, and keeps what explain says of a call without a backend."""

    def forward(self, x):
        self.decision = ad.explain(Q, Q, Q)
        return ad.dispatch_attention_fn(x, x, x)


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Asks(), Asks()])

    def forward(self, x):
        return self.blocks[1](self.blocks[0](x))


def words(decision):
    return str(decision).splitlines()[1]


def test_default_environment_scope_call(monkeypatch):
    decision = ad.explain(Q, Q, Q)
    assert decision.origin == ("default", "") and words(decision).endswith("(the default: nothing was asked for)")
    for name in ("DIFFUSERS_ATTN_BACKEND", "ATTENTION_DISPATCH_BACKEND"):
        monkeypatch.setenv(name, "reference")
        forget_environment()
        decision = ad.explain(Q, Q, Q)
        assert decision.backend == "reference" and decision.origin == ("environment", name)
        assert words(decision) == f"Request:  'reference' (set by the environment variable {name})"
    with ad.attention_backend("native"):
        decision = ad.explain(Q, Q, Q)
        assert decision.backend == "native" and decision.origin == ("scope", "")
        assert "`with attention_backend`" in words(decision)
        decision = ad.explain(Q, Q, Q, backend="flex")
        assert decision.request == "'flex'" and decision.origin == ("call", "")
        assert words(decision).endswith("(asked for by the call)")
    assert json.loads(decision.to_json())["origin"] == {"where": "call", "name": ""}


def test_an_environment_of_native_is_not_the_default(monkeypatch):
    monkeypatch.setenv("ATTENTION_DISPATCH_BACKEND", "native")
    forget_environment()
    assert ad.explain(Q, Q, Q).origin.where == "environment"


@pytest.mark.parametrize("scope", [None, "flex"])
def test_the_module_that_carries_the_setting(scope):
    model, x = Outer(), torch.randn(1, 4, 2, 8)
    ad.set_attention_backend(model, "reference", include="blocks.0")
    if scope is None:
        model(x)
    else:
        with ad.attention_backend(scope):
            model(x)
    first, second = (block.decision for block in model.blocks)
    assert first.request == "'reference'" and first.origin == ("model", "blocks.0")
    assert words(first).endswith("(set on the module 'blocks.0')")
    assert second.origin.where == ("default" if scope is None else "scope")
    ad.reset_attention_backend(model)
    model(x)
    assert model.blocks[0].decision.origin.where == "default"


def test_a_module_left_out_inside_a_routed_one_is_not_its_setting():
    model = ExtraTail()
    ad.set_attention_backend(model, "reference", exclude="inner")
    seen = []
    model.inner.proj.register_forward_pre_hook(lambda *_: seen.append(ad.explain(Q, Q, Q).origin))
    model.register_forward_pre_hook(lambda *_: seen.append(ad.explain(Q, Q, Q)))
    model(torch.randn(1, 4, DIM))
    assert seen[0].origin == ("model", "") and "set on the model itself" in words(seen[0])
    assert seen[1].where == "default"
    ad.reset_attention_backend(model)


def test_a_call_as_if_a_module_made_it():
    model = CrossModel(1)
    policy = policies.steps({"0:1": "reference", "1:": policies.roles(self="native", cross="flex")}, total=2)
    ad.set_attention_backend(model, policy)
    mixer = model.blocks[0].mixer
    with pytest.raises(InvalidCallError, match="at_step"):
        ad.explain(Q, Q, Q, module=mixer)
    with ad.attention_backend("native"):
        with policies.at_step(0):
            decision = ad.explain(Q, Q, Q, module=mixer)
            assert decision.backend == "reference" and decision.origin == ("model", "blocks.0.mixer")
            assert ad.explain(Q, Q, Q, module=mixer, backend="flex").origin.where == "call"
        with policies.at_step(1):
            assert ad.explain(Q, Q[:, :3], Q[:, :3], module=mixer).request == "'flex'"
        ad.reset_attention_backend(model)
        assert ad.explain(Q, Q, Q, module=mixer).origin.where == "scope"


def test_a_module_that_hands_its_setting_over_with_the_call():
    class Processor:
        _attention_backend = "reference"

        def __call__(self, x):
            return ad.dispatch_attention_fn(x, x, x, backend=self._attention_backend)

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.processor = Processor()

        def forward(self, x):
            return self.processor(x)

    model = nn.Sequential(Attention(), Attention())
    assert ad.explain(Q, Q, Q, module=model[1]).origin == ("model", "Attention")
    for name in ("native", "flex"):
        ad.set_attention_backend(model, name)
        decision = ad.explain(Q, Q, Q, module=model[1])
        assert (decision.backend, decision.origin) == (name, ("model", "1"))
    ad.reset_attention_backend(model)
    assert ad.explain(Q, Q, Q, module=model[1]).backend == "reference"
    assert not vars(model[1].processor)
