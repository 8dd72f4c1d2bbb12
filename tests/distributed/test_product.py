"""Every scheme with every mask, causality, head grouping and length against one float64 process."""

from __future__ import annotations

import pytest
import torch

from .product import cases
from .worlds import run_world

JOB = "tests.distributed.product:run_product"
LIMIT = 1e-5


@pytest.fixture(scope="module")
def outcomes():
    return {world: run_world(world, JOB, world) for world in (2, 3, 4)}


def check(results, case):
    for rank, result in enumerate(results):
        found = result[case.id]
        assert isinstance(found, dict), f"rank {rank}: {found}"
        assert max(found.values()) < LIMIT, f"rank {rank}: {found}"


@pytest.mark.parametrize("world, case", [pytest.param(world, case, id=case.id)
                                         for world in (2, 3, 4) for case in cases(world)])
def test_equals_one_process(outcomes, world, case):
    check(outcomes[world], case)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 CUDA GPUs")
def test_equals_one_process_over_nccl():
    results = run_world(2, JOB, 2, "cuda", backend="nccl")
    for case in cases(2):
        check(results, case)
