"""The examples in public docstrings run as they are printed."""

from __future__ import annotations

import doctest
from importlib import import_module

import pytest

MODULES = ("api", "models", "request", "registry", "settings", "testing.conformance")


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    module = import_module(f"attention_dispatch.{name}")
    result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


def test_the_public_functions_have_examples():
    import attention_dispatch

    with_examples = (
        "dispatch_attention_fn",
        "scaled_dot_product_attention",
        "explain",
        "attention_backend",
        "set_attention_backend",
        "AttentionModelMixin",
    )
    assert [name for name in with_examples if ">>>" not in (getattr(attention_dispatch, name).__doc__ or "")] == []
    undocumented = [name for name in attention_dispatch.__all__ if not getattr(attention_dispatch, name).__doc__]
    assert undocumented == []
