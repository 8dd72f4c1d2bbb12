"""Pipelines in bfloat16 on a CUDA GPU, on torch's own kernels: ``pytest -m gpu tests/diffusers``."""

from __future__ import annotations

import pytest
import torch

import attention_dispatch as ad
from attention_dispatch.integrations import diffusers as integration

from .pipelines import build, denoiser, draw

pytestmark = pytest.mark.gpu

# _native_flash takes no mask, and two prompts of different length need one.
RUNS = [
    (name, backend)
    for name in ("flux", "qwen_image", "stable_diffusion_3")
    for backend in ("native", "_native_flash", "_native_cudnn", "_native_efficient", "flex")
    if (name, backend) != ("qwen_image", "_native_flash")
]


def on_gpu(name, dtype):
    pipeline, arguments = build(name)
    pipeline.to("cuda", dtype)
    moved = {
        key: value.to("cuda", dtype if value.is_floating_point() else None) if isinstance(value, torch.Tensor) else value
        for key, value in arguments.items()
    }
    return pipeline, moved


def require(backend):
    status = ad.backend_status(backend)
    if not status.available:
        pytest.skip(str(status))


@pytest.mark.parametrize(("name", "backend"), RUNS)
def test_pictures_on_a_gpu(name, backend, cuda, ran):
    require(backend)
    integration.deactivate()
    exact = draw(*on_gpu(name, torch.float32)).double()
    error_of_plain = (draw(*on_gpu(name, torch.bfloat16)).double() - exact).abs().max()
    integration.activate()
    pipeline, arguments = on_gpu(name, torch.bfloat16)
    denoiser(pipeline).set_attention_backend(backend)
    error = (draw(pipeline, arguments).double() - exact).abs().max()
    assert ran[backend] > 0
    assert set(ran) <= {backend, "native"}
    # Twice what bfloat16 costs plain diffusers, and one step of bfloat16 for pictures in 0 to 1.
    assert error <= 2 * error_of_plain + 2**-8


def test_a_mask_on_the_flash_kernel_is_refused_on_a_gpu(cuda):
    require("_native_flash")
    pipeline, arguments = on_gpu("qwen_image", torch.bfloat16)
    denoiser(pipeline).set_attention_backend("_native_flash")
    with pytest.raises(ad.BackendRejectedError, match="mask"):
        draw(pipeline, arguments)


@pytest.mark.parametrize("backend", ["native", "flex"])
def test_compiled_flux_on_a_gpu(backend, cuda):
    require(backend)
    expected = draw(*on_gpu("flux", torch.bfloat16))
    pipeline, arguments = on_gpu("flux", torch.bfloat16)
    pipeline.transformer.set_attention_backend(backend)
    pipeline.transformer.compile_repeated_blocks(fullgraph=True)
    torch.testing.assert_close(draw(pipeline, arguments), expected, atol=2e-2, rtol=0)
