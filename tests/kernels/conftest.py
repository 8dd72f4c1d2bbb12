"""Kernel tests run twice: at small sizes on the CPU under Triton's interpreter, and (marked gpu) on a GPU."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch


def _no_interpreter() -> str:
    """Why kernels cannot run on the CPU here; empty if they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if os.environ.get("TRITON_INTERPRET") != "1":
        return "kernels run on the GPU only, unless TRITON_INTERPRET=1 is set before Triton is imported (make test does)"
    import numpy

    try:
        int(numpy.zeros(1))
    except TypeError:
        return f"triton's interpreter does not work with numpy {numpy.__version__} (pip install 'numpy<2.4')"
    return ""


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cpu" and (reason := _no_interpreter()):
        pytest.skip(reason)
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no CUDA GPU")
    torch.manual_seed(0)
    return request.param


@pytest.fixture
def cuda(request: pytest.FixtureRequest) -> str:
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA GPU")
    torch.manual_seed(0)
    return "cuda"
