"""``model.enable_parallelism(config=ContextParallelConfig(...))`` of diffusers, over two processes."""

from __future__ import annotations

import pytest

pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'attention-dispatch[diffusers]'")

from .worlds import run_world

CASES = [f"{name} {scheme} {backend}" for name in ("flux", "wan") for scheme in ("ring", "ulysses")
         for backend in ("", "reference", "auto")]


@pytest.fixture(scope="module")
def results():
    return run_world(2, "tests.distributed.pictures:run_pictures")


@pytest.mark.parametrize("case", [*CASES, "sd3 ring", "sd3 ulysses"])
def test_a_sharded_pipeline_draws_what_one_process_draws(results, case):
    for rank, found in enumerate(results):
        assert isinstance(found[case], float), f"rank {rank}: {found[case]}"
        assert found[case] < 1e-5, f"rank {rank}: {found[case]}"
