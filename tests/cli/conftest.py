"""Each test has a store of its own."""

from tests.tuning.conftest import own_store, registered  # noqa: F401
