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

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 CUDA GPUs")]


@pytest.fixture(scope="module")
def results():
    return run_world(2, "tests.distributed.devices:run_devices", backend="nccl")


@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_one_process(results, backend):
    if backend in results[0]:
        pytest.skip(results[0][backend])
    tolerance = registry.get(backend).capabilities[-1].tolerance.relative_l2
    wrong = []
    modes = [mode for mode in ("inference", "training") if f"{backend} ring plain {mode}" in results[0]]
    assert modes
    for scheme, name, mode in itertools.product(SCHEMES, CALLS, modes):
        refusal = next((code for (call, when), code in REFUSALS.get(backend, {}).items()
                        if call in (None, name) and when in (None, mode)), None)
        for rank, found in enumerate(results):
            result = found[f"{backend} {scheme} {name} {mode}"]
            if isinstance(result, dict):
                fine = refusal is None and max(result.values()) < max(LIMIT, tolerance)
            else:
                fine = result == f"refused: {refusal}"
            if not fine:
                wrong.append(f"rank {rank} {scheme} {name} {mode}: {result}")
    assert not wrong, "\n".join(wrong)
