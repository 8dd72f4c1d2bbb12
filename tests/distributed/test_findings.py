"""Regressions of diffusers' context parallelism (0.40 to 0.42), each of which gave a wrong result or a crash there.

1. backends without context parallelism took the setting and attended to their shard only; 2. a ring used one rank's mask
for every visiting shard; 3. Ulysses with three uneven shards misplaced every mask entry after rank 1; 4. dropout was drawn
anew in the backward pass; 5. forward-only kernels lost gradients without a word; 6. a ring on ``native`` raised at its
first call; 7. cross-attention crashed in the backward pass of Ulysses, and its head count had to divide; 8. masks by row or
head were not gathered; 9. grouped heads were refused; 10. the LSE had another shape than without ranks. Models without the
attribute (11) and pipelines are in ``test_diffusers``, unified degrees with masks in ``test_product``, bool masks on cuDNN
in ``test_devices``, and keys resident by one shard in ``test_scenes``.
"""

from __future__ import annotations

import pytest

from attention_dispatch.distributed import ContextParallel
from attention_dispatch.errors import InvalidCallError

from .worlds import run_world

EXACT = {
    "padding with a gap": "2 and 3",
    "native": "6",
    "cross-attention": "7",
    "heads that do not divide": "7",
    "mask by row and head": "8",
    "grouped heads": "9",
    "lse": "10",
    "forward-only in inference": "5",
}


@pytest.fixture(scope="module")
def results():
    return run_world(3, "tests.distributed.findings:run_findings")


@pytest.mark.parametrize("scheme", ["ring", "ulysses"])
@pytest.mark.parametrize("case", EXACT)
def test_equals_one_process(results, scheme, case):
    for rank, world in enumerate(results):
        found = world[f"{scheme}: {case}"]
        assert isinstance(found, dict), f"rank {rank}: {found}"
        assert max(found.values()) < 1e-5, f"rank {rank}: {found}"


@pytest.mark.parametrize("scheme", ["ring", "ulysses"])
def test_1_no_backend_attends_to_its_shard_only(results, scheme):
    for world in results:
        found = world[f"{scheme}: every backend"]
        assert {"native", "_native_math", "flex", "reference"} <= set(found)
        for name, result in found.items():
            assert result in ("BackendRejectedError", "NoBackendError") or result < 1e-5, f"{name}: {result}"
        assert found["native"] < 1e-5


@pytest.mark.parametrize("scheme", ["ring", "ulysses"])
def test_4_dropout_is_refused(results, scheme):
    for world in results:
        assert world[f"{scheme}: dropout"].startswith("InvalidCallError: dropout_p=0.1")


@pytest.mark.parametrize("scheme", ["ring", "ulysses"])
def test_5_forward_only_kernels_refuse_training(results, scheme):
    for world in results:
        text = world[f"{scheme}: forward-only under autograd"]
        assert text.startswith("BackendRejectedError") and "[gradients]" in text


def test_without_a_process_group_the_error_says_what_to_do():
    with pytest.raises(InvalidCallError, match="init_process_group"):
        ContextParallel(ring=2)
