"""Worlds of gloo or NCCL processes that are started once and run many cases each."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# A world whose processes wait for each other longer than this is broken.
WORLD_TIMEOUT_S = 240


def run_world(size: int, job: str, *args: Any, backend: str = "gloo") -> list[dict[str, Any]]:
    """Results of ``job`` on every rank.

    Args:
        size: number of processes.
        job: ``"module:function"`` that is called as ``function(rank, *args)`` and returns a picklable dict.
        backend: of torch.distributed.
    """
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        Path(folder, "args").write_bytes(pickle.dumps(args))
        processes = [subprocess.Popen([sys.executable, "-m", __name__, folder, str(rank), str(size), backend, job],
                                      env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
                     for rank in range(size)]
        outputs = []
        try:
            for process in processes:
                outputs.append(process.communicate(timeout=WORLD_TIMEOUT_S)[0])
        finally:
            for process in processes:
                process.kill()
        for rank, process in enumerate(processes):
            if process.returncode:
                raise AssertionError(f"rank {rank} of {size} ended with {process.returncode}:\n{outputs[rank]}")
        return [pickle.loads(Path(folder, f"result{rank}").read_bytes()) for rank in range(size)]


def outcome(function: Callable[[], Any]) -> Any:
    """What a case gives, or the text of what it raises: one case must not end the world of the others."""
    try:
        return function()
    except Exception as error:
        return f"{type(error).__name__}: {error}\n{traceback.format_exc()}"


def _main(folder: str, rank: str, size: str, backend: str, job: str) -> None:
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(int(rank))
    dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=int(rank), world_size=int(size),
                            timeout=timedelta(seconds=60))
    module, _, name = job.partition(":")
    function = getattr(__import__(module, fromlist=[name]), name)
    result = function(int(rank), *pickle.loads(Path(folder, "args").read_bytes()))
    Path(folder, f"result{rank}").write_bytes(pickle.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    _main(*sys.argv[1:])
