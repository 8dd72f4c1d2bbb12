"""``attention_dispatch.set_attention_backend`` on diffusers models does what diffusers' own setter does."""

from __future__ import annotations

import pytest
import torch

import attention_dispatch as ad
from attention_dispatch import policies
from attention_dispatch.integrations import diffusers as integration

from .models import any_flow_transformer, flux_transformer, forward

PINNED = ("blocks.0.attn1", "accepts only 'flex'")


@pytest.mark.parametrize("by", ["direct", "method", "install"])
def test_processors_that_accept_only_some_backends_are_left(by):
    model, inputs = any_flow_transformer()
    expected = forward(model, inputs)
    ways = {
        "direct": lambda: ad.set_attention_backend(model, "reference"),
        "method": lambda: (integration.activate(), model.set_attention_backend("reference"))[1],
        "install": lambda: integration.install(model, "reference"),
    }
    report = ways[by]()
    assert report.left == (PINNED,) and report.routed == (("blocks.0.attn2", "'reference'"),)
    torch.testing.assert_close(forward(model, inputs), expected, atol=1e-4, rtol=1e-4)
    ad.reset_attention_backend(model)
    integration.uninstall()
    torch.testing.assert_close(forward(model, inputs), expected)


def test_a_policy_may_name_what_they_accept():
    model, inputs = any_flow_transformer()
    expected = forward(model, inputs)
    report = ad.set_attention_backend(model, policies.modules({"*.attn1": "flex", "*.attn2": "reference"}))
    assert not report.left and len(report.routed) == 2
    torch.testing.assert_close(forward(model, inputs), expected, atol=1e-4, rtol=1e-4)
    report = ad.set_attention_backend(model, policies.roles(self=["flex", "native"], cross="native"))
    assert report.left == ((PINNED[0], f"{PINNED[1]}; keeps 'flex'"),)
    with pytest.raises(ad.InvalidCallError, match="accepts only 'flex'"):
        ad.set_attention_backend(model, "native", include="*.attn1")
    ad.reset_attention_backend(model)
    integration.uninstall()


def test_a_model_alone_activates_the_integration():
    integration.deactivate()
    model, inputs = flux_transformer()
    expected = forward(model, inputs)
    ad.set_attention_backend(model, "reference")
    torch.testing.assert_close(forward(model, inputs), expected, atol=1e-4, rtol=1e-4)
    ad.reset_attention_backend(model)
    torch.testing.assert_close(forward(model, inputs), expected)
    integration.uninstall()
