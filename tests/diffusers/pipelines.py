"""Tiny random diffusers pipelines that build without a network: each entry returns (pipeline, call arguments).

Prompts are given as embeddings, so that no tokenizer is needed. Heads are 64 wide, so that GPU kernels take them.
"""

from __future__ import annotations

from typing import Any

import diffusers
import torch

NO_TEXT_ENCODER = {"text_encoder": None, "tokenizer": None}


def _randn(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _vae(latent_channels: int = 4, **more: Any) -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=(32,), norm_num_groups=4, latent_channels=latent_channels, sample_size=32, **more
    )


def _flow() -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler()


def flux() -> tuple[Any, dict[str, Any]]:
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=64, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[16, 24, 24],
    )  # fmt: skip
    vae = _vae(1, shift_factor=0.0, scaling_factor=1.0)
    pipeline = diffusers.FluxPipeline(
        scheduler=_flow(), vae=vae, transformer=transformer, text_encoder_2=None, tokenizer_2=None, **NO_TEXT_ENCODER
    )
    return pipeline, {"prompt_embeds": _randn(1, 8, 32), "pooled_prompt_embeds": _randn(1, 32), "height": 8, "width": 8}


def qwen_image() -> tuple[Any, dict[str, Any]]:
    transformer = diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=64, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(16, 24, 24),
    )  # fmt: skip
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=24, z_dim=4, dim_mult=[1, 2, 4], num_res_blocks=1, temperal_downsample=[False, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    pipeline = diffusers.QwenImagePipeline(scheduler=_flow(), vae=vae, transformer=transformer, **NO_TEXT_ENCODER)
    # The second prompt is shorter: its padding lies between the text and the image tokens.
    lengths = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0]])
    return pipeline, {
        "prompt_embeds": _randn(2, 7, 16), "prompt_embeds_mask": lengths, "true_cfg_scale": 1.0, "height": 32, "width": 32
    }


def wan() -> tuple[Any, dict[str, Any]]:
    transformer = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=64, in_channels=16, out_channels=16,
        text_dim=32, freq_dim=64, ffn_dim=32, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0)
    pipeline = diffusers.WanPipeline(scheduler=scheduler, vae=vae, transformer=transformer, transformer_2=None, **NO_TEXT_ENCODER)
    return pipeline, {
        "prompt_embeds": _randn(1, 16, 32), "negative_prompt_embeds": _randn(1, 16, 32, seed=2), "num_frames": 9, "height": 16,
        "width": 16,
    }  # fmt: skip


def z_image() -> tuple[Any, dict[str, Any]]:
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=16, dim=128, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
        axes_dims=[32, 16, 16], axes_lens=[256, 32, 32],
    )  # fmt: skip
    with torch.no_grad():
        transformer.x_pad_token.fill_(1.0)
        transformer.cap_pad_token.fill_(1.0)
    vae = _vae(16, shift_factor=0.1, scaling_factor=0.4)
    pipeline = diffusers.ZImagePipeline(scheduler=_flow(), vae=vae, transformer=transformer, **NO_TEXT_ENCODER)
    return pipeline, {
        "prompt_embeds": [_randn(7, 16), _randn(40, 16)], "negative_prompt_embeds": [_randn(7, 16), _randn(9, 16)],
        "guidance_scale": 3.0, "height": 32, "width": 32,
    }  # fmt: skip


def flux2() -> tuple[Any, dict[str, Any]]:
    transformer = diffusers.Flux2Transformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=64, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=[16, 16, 16, 16],
    )  # fmt: skip
    vae = diffusers.AutoencoderKLFlux2(
        sample_size=32, down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(4,), layers_per_block=1, latent_channels=1, norm_num_groups=1, use_quant_conv=False,
        use_post_quant_conv=False,
    )  # fmt: skip
    pipeline = diffusers.Flux2Pipeline(scheduler=_flow(), vae=vae, transformer=transformer, **NO_TEXT_ENCODER)
    return pipeline, {"prompt_embeds": _randn(1, 8, 16), "height": 8, "width": 8}


def ltx() -> tuple[Any, dict[str, Any]]:
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=64, cross_attention_dim=128,
        num_layers=1, caption_channels=32,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False), decoder_spatio_temporal_scaling=(True, True, False, False),
        patch_size=1,
    )  # fmt: skip
    pipeline = diffusers.LTXPipeline(scheduler=_flow(), vae=vae, transformer=transformer, **NO_TEXT_ENCODER)
    keep = torch.ones(1, 16, dtype=torch.bool)
    keep[0, 9:] = False
    return pipeline, {
        "prompt_embeds": _randn(1, 16, 32), "prompt_attention_mask": keep, "negative_prompt_embeds": _randn(1, 16, 32, seed=2),
        "negative_prompt_attention_mask": keep, "height": 32, "width": 32, "num_frames": 9,
    }  # fmt: skip


def stable_diffusion_3() -> tuple[Any, dict[str, Any]]:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=32, patch_size=1, in_channels=4, num_layers=1, attention_head_dim=64, num_attention_heads=2,
        joint_attention_dim=32, caption_projection_dim=128, pooled_projection_dim=64, out_channels=4,
    )  # fmt: skip
    vae = _vae(4, shift_factor=0.1, scaling_factor=1.0)
    pipeline = diffusers.StableDiffusion3Pipeline(
        scheduler=_flow(), vae=vae, transformer=transformer, text_encoder_2=None, tokenizer_2=None,
        text_encoder_3=None, tokenizer_3=None, **NO_TEXT_ENCODER,
    )  # fmt: skip
    return pipeline, {
        "prompt_embeds": _randn(1, 8, 32), "pooled_prompt_embeds": _randn(1, 64), "guidance_scale": 1.0, "height": 16, "width": 16
    }


def stable_diffusion_xl() -> tuple[Any, dict[str, Any]]:
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(32, 128), layers_per_block=1, sample_size=16, time_cond_proj_dim=None, in_channels=4,
        out_channels=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=(1, 2), use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=8, transformer_layers_per_block=(1, 1),
        projection_class_embeddings_input_dim=80, cross_attention_dim=64, norm_num_groups=8,
    )  # fmt: skip
    pipeline = diffusers.StableDiffusionXLPipeline(
        scheduler=diffusers.EulerDiscreteScheduler(), vae=_vae(4, force_upcast=False), unet=unet, text_encoder_2=None,
        tokenizer_2=None, add_watermarker=False, **NO_TEXT_ENCODER,
    )  # fmt: skip
    return pipeline, {
        "prompt_embeds": _randn(1, 7, 64), "pooled_prompt_embeds": _randn(1, 32), "guidance_scale": 1.0, "height": 16, "width": 16
    }


def pixart_sigma() -> tuple[Any, dict[str, Any]]:
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=8, num_layers=2, attention_head_dim=64, num_attention_heads=2, caption_channels=32, in_channels=4,
        cross_attention_dim=128, out_channels=8,
    )  # fmt: skip
    pipeline = diffusers.PixArtSigmaPipeline(
        scheduler=diffusers.DDIMScheduler(), vae=_vae(4), transformer=transformer, **NO_TEXT_ENCODER
    )
    keep = torch.ones(1, 7, dtype=torch.long)
    keep[0, 4:] = 0
    return pipeline, {
        "prompt_embeds": _randn(1, 7, 32), "prompt_attention_mask": keep, "negative_prompt_embeds": _randn(1, 7, 32, seed=2),
        "negative_prompt_attention_mask": keep, "negative_prompt": None, "use_resolution_binning": False, "height": 8, "width": 8,
    }  # fmt: skip


def cogvideox() -> tuple[Any, dict[str, Any]]:
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=64, in_channels=4, out_channels=4, time_embed_dim=2,
        text_embed_dim=32, num_layers=1, sample_width=2, sample_height=2, sample_frames=9, patch_size=2,
        temporal_compression_ratio=4, max_text_seq_length=16,
    )  # fmt: skip
    blocks = 4
    vae = diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * blocks, up_block_types=("CogVideoXUpBlock3D",) * blocks,
        block_out_channels=(8,) * blocks, latent_channels=4, layers_per_block=1, norm_num_groups=2,
        temporal_compression_ratio=4,
    )  # fmt: skip
    pipeline = diffusers.CogVideoXPipeline(
        scheduler=diffusers.CogVideoXDDIMScheduler(), vae=vae, transformer=transformer, **NO_TEXT_ENCODER
    )
    return pipeline, {
        "prompt_embeds": _randn(1, 16, 32), "negative_prompt_embeds": _randn(1, 16, 32, seed=2), "height": 16, "width": 16,
        "num_frames": 9,
    }  # fmt: skip


PIPELINES = {
    build.__name__: build
    for build in (
        flux, qwen_image, wan, z_image, flux2, ltx, stable_diffusion_3, stable_diffusion_xl, pixart_sigma, cogvideox
    )
}  # fmt: skip
# These call scaled_dot_product_attention themselves; the others go through diffusers' dispatcher.
DIRECT = ("stable_diffusion_3", "stable_diffusion_xl", "pixart_sigma", "cogvideox")
# A mask of these hides tokens.
MASKED = ("qwen_image", "z_image", "ltx", "pixart_sigma")


def build(name: str) -> tuple[Any, dict[str, Any]]:
    """The same pipeline at every call, and the arguments to call it with."""
    torch.manual_seed(0)
    pipeline, arguments = PIPELINES[name]()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, arguments


def denoiser(pipeline: Any) -> Any:
    return pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer


def draw(pipeline: Any, arguments: dict[str, Any]) -> torch.Tensor:
    """Two steps from a fixed seed; the decoded images or frames as one tensor."""
    result = pipeline(
        **arguments, num_inference_steps=2, output_type="pt", generator=torch.Generator().manual_seed(0),
        return_dict=False,
    )[0]  # fmt: skip
    return result if isinstance(result, torch.Tensor) else torch.stack(list(result))
