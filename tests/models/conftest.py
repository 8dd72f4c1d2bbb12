import pytest
import torch
import torch.nn.functional as F

from attention_dispatch.backends.reference import CAPABILITIES, attention
from attention_dispatch.registry import Backend, register_backend, unregister_backend

_SDPA = F.scaled_dot_product_attention


class Probe:
    """A backend that computes exactly, and counts its calls."""

    def __init__(self, name):
        self.name = name
        self.calls = []

    def forward(self, call):
        self.calls.append(tuple(call.query.shape))
        return attention(call)

    def taken(self):
        """Number of calls since the last question."""
        count = len(self.calls)
        self.calls.clear()
        return count


@pytest.fixture
def probes():
    """Two counting backends, ``probe_a`` and ``probe_b``."""
    found = [Probe("probe_a"), Probe("probe_b")]
    for probe in found:
        register_backend(
            Backend(name=probe.name, family="probe", capabilities=(CAPABILITIES,), forward=probe.forward)
        )
    yield found
    for probe in found:
        unregister_backend(probe.name)


@pytest.fixture
def probe(probes):
    return probes[0]


@pytest.fixture(autouse=True)
def _nothing_left_behind():
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    import gc

    gc.collect()
    assert F.scaled_dot_product_attention is _SDPA, "a test left torch's function replaced"
