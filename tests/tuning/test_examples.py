"""The examples in docstrings run as they are printed."""

import doctest

import pytest

from attention_dispatch import recording
from attention_dispatch.tuning import measure, session


@pytest.mark.parametrize("module", [recording, session, measure], ids=lambda module: module.__name__)
def test_examples_run(module):
    result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.attempted and not result.failed
