"""Every kernel that is here, over two GPUs against one float64 process."""

from __future__ import annotations

import itertools

import pytest
import torch

from attention_dispatch import registry

from .devices import BACKENDS, CALLS, SCHEMES
from .worlds import run_world

# Half as much again as the largest error of one GPU in bfloat16, gradients included.
LIMIT = 1.2e-2
# (call, mode) that a backend's declaration refuses, with the code; None is every one.
REFUSALS = {
    "triton_sage": {(None, "training"): "gradients"},
    "_native_flash": {("padded", None): "mask"},
    "_native_cudnn": {("padded", "training"): "known_bad"},
    "_flash_3": {("padded", None): "mask"},
}
# A FlashAttention 3 that was built without its backward pass refuses it.
LEFT_OUT = ("_flash_3", "training", "refused: grad")
MODES = ("inference", "training")

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 CUDA GPUs")]


@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_one_process(backend):
    results = run_world(2, "tests.distributed.devices:run_device", backend, backend="nccl")
    if "unavailable" in results[0]:
        pytest.skip(results[0]["unavailable"])
    tolerance = registry.get(backend).capabilities[-1].tolerance.relative_l2
    wrong, worst = [], 0.0
    for (rank, found), scheme, name, mode in itertools.product(enumerate(results), SCHEMES, CALLS, MODES):
        result = found[f"{scheme} {name} {mode}"]
        refusal = next((code for (call, when), code in REFUSALS.get(backend, {}).items()
                        if call in (None, name) and when in (None, mode)), None)
        if isinstance(result, dict):
            fine = refusal is None and max(result.values()) < max(LIMIT, tolerance)
            worst = max(worst, *result.values())
        else:
            fine = result == f"refused: {refusal}" or (backend, mode, result) == LEFT_OUT
        if not fine:
            wrong.append(f"rank {rank} {scheme} {name} {mode}: {result}")
    print(f"{backend}: largest relative error {worst:.1e}")
    assert not wrong, "\n".join(wrong)
