"""The calls of real models have the sizes that their configurations say."""

from __future__ import annotations

import inspect

import pytest
import torch

import attention_dispatch as ad
from attention_dispatch.call import canonicalise, spec_of
from attention_dispatch.tuning import shapes
from attention_dispatch.tuning.shapes import MODELS, tokens


@pytest.mark.parametrize(
    "count, arguments",
    [
        # Latents by VAE factor and patch: 64 x 64, 83 x 83, 21 x 30 x 52, 21 x 45 x 80, 33 x 45 x 80, 21 x 16 x 22.
        (4096, {"width": 1024, "height": 1024, "pixels": 16}),
        (6889, {"width": 1328, "height": 1328, "pixels": 16}),
        (32760, {"width": 832, "height": 480, "frames": 81, "pixels": 16, "per_latent": 4}),
        (75600, {"width": 1280, "height": 720, "frames": 81, "pixels": 16, "per_latent": 4}),
        (118800, {"width": 1280, "height": 720, "frames": 129, "pixels": 16, "per_latent": 4}),
        (7392, {"width": 704, "height": 512, "frames": 161, "pixels": 32, "per_latent": 8}),
        (196, {"width": 224, "height": 224, "pixels": 16}),
    ],
)
def test_tokens(count, arguments):
    assert tokens(**arguments) == count


def test_lengths_of_the_models():
    lengths = {name: [(s.batch, s.q_len, s.k_len) for s in model.shapes] for name, model in MODELS.items()}
    assert lengths["flux"] == [(1, 4608, 4608)]
    assert lengths["wan-720p"] == [(1, 75600, 75600), (1, 75600, 512)]
    assert lengths["hunyuan-video"] == [(1, 119056, 119056)]
    assert lengths["ltx"] == [(2, 7392, 7392), (2, 7392, 128)]
    assert lengths["sdxl"] == [(2, 4096, 4096), (2, 1024, 1024), (2, 4096, 77), (2, 1024, 77)]
    assert lengths["vit-l"] == [(64, 197, 197)] * 2


@pytest.mark.parametrize(
    "model, name",
    [
        ("flux", "FluxTransformer2DModel"),
        ("qwen-image", "QwenImageTransformer2DModel"),
        ("wan-480p", "WanTransformer3DModel"),
        ("wan-720p", "WanTransformer3DModel"),
        ("hunyuan-video", "HunyuanVideoTransformer3DModel"),
        ("ltx", "LTXVideoTransformer3DModel"),
    ],
)
def test_heads_are_those_of_the_class_whose_defaults_are_the_published_model(model, name):
    diffusers = pytest.importorskip("diffusers", reason="compares with diffusers' classes")
    defaults = inspect.signature(getattr(diffusers, name).__init__).parameters
    wanted = tuple(defaults[field].default for field in ("num_attention_heads", "attention_head_dim"))
    assert {(shape.heads, shape.head_dim) for shape in MODELS[model].shapes} == {wanted}


def test_sdxl_heads_are_its_channels_by_64():
    # block_out_channels 320, 640, 1280 and attention_head_dim 5, 10, 20, which in this class counts heads.
    assert [(s.heads, s.head_dim) for s in MODELS["sdxl"].shapes[:2]] == [(640 // 64, 64), (1280 // 64, 64)]


@pytest.mark.parametrize("mask", shapes.MASKS)
def test_inputs_have_the_mask_that_the_shape_names(mask):
    shape = shapes.Shape("", 2, 24, 40, 4, 2, 16, mask=mask, dtype="float32")
    call = shapes.inputs(shape, torch.device("cpu"))
    kind = "bias" if mask == "key_bias" else mask
    spec = spec_of(call)
    assert spec.mask == kind and spec.mask_per_head == (mask == "key_bias")
    assert (spec.heads, spec.kv_heads) == (4, 2)


def test_the_text_mask_of_ltx_is_what_its_processor_passes():
    """(1 - mask) * -10000, repeated for every head: additive, one row for all queries."""
    shape = MODELS["ltx"].shapes[1]._replace(batch=1, q_len=8, k_len=6, heads=2, kv_heads=2, dtype="float32")
    given = shapes.inputs(shape, torch.device("cpu"))
    keep = torch.tensor([[1.0, 1, 1, 1, 0, 0]])
    as_model = ((1 - keep) * -10000.0)[:, None].repeat_interleave(2, dim=0).view(1, 2, -1, 6)
    call = canonicalise(given.query, given.key, given.value, as_model)
    assert torch.equal(call.mask.tensor, given.mask.tensor) and spec_of(call) == spec_of(given)
    assert ad.explain(given.query, given.key, given.value, as_model).backend == "native"
