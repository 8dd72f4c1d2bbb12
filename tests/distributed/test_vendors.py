"""Kernels of external packages in rings and in Ulysses, over fakes of their recorded signatures."""

from __future__ import annotations

import pytest

from .vendors import ROWS, WITHOUT_LSE
from .worlds import run_world

# The fakes compute in bfloat16; a ring rounds once for every shard of keys.
ALLOWED = 1e-2


@pytest.fixture(scope="module")
def results():
    return run_world(2, "tests.distributed.vendors:two_ranks")


@pytest.mark.parametrize("name", ROWS)
def test_equals_one_process(results, name):
    for rank, found in enumerate(results):
        assert len(found[name]) >= 2
        for case, errors in found[name].items():
            assert isinstance(errors, dict), f"rank {rank}, {case}: {errors}"
            assert max(errors.values()) < ALLOWED, f"rank {rank}, {case}: {errors}"
            assert ("dq" in errors) == ROWS[name][2]


@pytest.mark.parametrize("name", WITHOUT_LSE)
def test_a_build_without_lse_is_refused_in_a_ring_and_served_in_ulysses(results, name):
    for found in results:
        assert "BackendRejectedError" in found[f"{name} without LSE"]["ring"]
        assert "[lse]" in found[f"{name} without LSE"]["ring"]
        assert max(found[f"{name} without LSE"]["ulysses"].values()) < ALLOWED
