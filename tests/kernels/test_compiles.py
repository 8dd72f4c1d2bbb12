"""Kernels compile for sm_90 without a GPU: what the interpreter lets pass, a compiler need not."""

from __future__ import annotations

import importlib.util
import os
import platform
import subprocess
import sys

import pytest

# Triton is told that there is an sm_90, and every launch stops after compilation. In a process of its own, because the
# interpreter, where it is switched on, replaces the compiler for good.
PROGRAM = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

class Hopper:
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device=None): return 0
    def get_device_interface(self): return torch.cuda
    def get_active_torch_device(self): return torch.device("cpu")

driver.set_active(Hopper())
compiled = []
run = JITFunction.run

def compile_only(self, *arguments, grid, warmup, **options):
    made = run(self, *arguments, grid=grid, warmup=True, **options)
    made.asm["cubin"]
    compiled.append(self.__name__)

JITFunction.run = compile_only

from attention_dispatch.kernels import arguments, flash, sage, tiles

tiles._is_hopper = flash.is_hopper_or_newer = sage.is_hopper_or_newer = lambda device: True

def inputs(head_dim, head_dim_v, length=300):
    return [torch.empty(1, length, 2, d, dtype=torch.float16) for d in (head_dim, head_dim, head_dim_v)]

# Keys and values of different padded widths, through the plain kernel
sage.sage_attention_forward(*inputs(16, 16), scale=0.1, pv="fp8", return_lse=True)
flash.runs_on_hopper = sage.runs_on_hopper = lambda *arguments: True
sage.sage_attention_forward(*inputs(128, 128), scale=0.1, pv="fp8", return_lse=True, is_causal=True)
flash.flash_attention_forward(*inputs(128, 128), scale=0.1, return_lse=True, is_causal=True)
print(*compiled)
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the assembler in Triton's wheel is for x86-64")
def test_kernels_compile_for_sm_90(tmp_path: object) -> None:
    import triton

    if not triton.__version__.startswith("3.6."):
        pytest.skip("the Gluon kernels are written for Triton 3.6")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == [
        "statistics_kernel", "quantise_kernel", "sage_forward_kernel",
        "statistics_kernel", "quantise_kernel", "sage_hopper_kernel",
        "flash_hopper_kernel",
    ]  # fmt: skip
