"""Plain diffusers to compare with, and a check after every test that diffusers is as it was."""

from __future__ import annotations

import gc
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'attention-dispatch[diffusers]'")

import diffusers.models.attention_dispatch as upstream
from torch.overrides import TorchFunctionMode

from attention_dispatch.backends import reference
from attention_dispatch.integrations import diffusers as integration
from attention_dispatch.registry import Backend, register_backend, unregister_backend
from attention_dispatch.request import current

from .pipelines import build, draw

# Not a global of this file: routing by scope replaces those too.
_TORCH = {"sdpa": F.scaled_dot_product_attention}
integration.deactivate()


class Plain(NamedTuple):
    """What diffusers draws by itself, and how many times it calls torch's attention for it."""

    picture: torch.Tensor
    calls: int


class SdpaCalls(TorchFunctionMode):
    """Counts calls of torch's own scaled_dot_product_attention."""

    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is _TORCH["sdpa"]
        return func(*args, **(kwargs or {}))


_plain: dict[str, Plain] = {}


@pytest.fixture
def plain(active: None) -> Callable[[str], Plain]:
    """``plain(name)``: the result of the pipeline with diffusers' own dispatcher."""

    def of(name: str) -> Plain:
        if name not in _plain:
            integration.deactivate()
            pipeline, arguments = build(name)
            with SdpaCalls() as calls:
                _plain[name] = Plain(draw(pipeline, arguments), calls.count)
            integration.activate()
        return _plain[name]

    return of


@pytest.fixture(autouse=True)
def active(one_thread: None) -> Iterator[None]:
    """The integration, on for each test; afterwards nothing of it may be left."""
    integration.activate()
    yield
    integration.uninstall()
    ours = [replacement for _, replacement in integration._REBINDINGS]
    left = [
        f"{name}.{attribute}"
        for name, module in list(sys.modules.items())
        if name != integration.__name__ and name.startswith(("diffusers", "transformers", "tests"))
        for attribute, value in list(getattr(module, "__dict__", {}).items())
        if any(value is replacement for replacement in ours)
    ]
    assert not left
    assert len(upstream.AttentionBackendName) == len(upstream._AttentionBackendRegistry._backends)
    if F.scaled_dot_product_attention is not _TORCH["sdpa"]:
        gc.collect()  # a model that was dropped without a reset
    assert F.scaled_dot_product_attention is _TORCH["sdpa"]


@pytest.fixture
def spy() -> Iterator[list[Any]]:
    """A backend ``"spy"`` that computes with the reference; the list of the calls it got."""
    calls: list[Any] = []

    def forward(call: Any) -> Any:
        calls.append(call)
        return reference.attention(call)

    register_backend(Backend("spy", "test", (reference.CAPABILITIES,), forward))
    yield calls
    unregister_backend("spy")


@pytest.fixture
def ran() -> Iterator[Counter[str]]:
    """How many calls each backend computed."""
    counted: Counter[str] = Counter()

    def observe(call: Any, spec: Any, request: Any, plan: Any, output: Any) -> Any:
        counted[plan.backend.name] += 1
        return output

    current.observer = observe
    current.refresh()
    yield counted
    current.observer = None
    current.refresh()
