"""Small single models with inputs for one forward."""

from __future__ import annotations

from typing import Any

import diffusers
import torch


def flux_transformer(layers: int = 1) -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    model = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=layers, num_single_layers=1, attention_head_dim=64,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[16, 24, 24],
    )  # fmt: skip
    return model.eval(), {
        "hidden_states": torch.randn(1, 16, 4), "encoder_hidden_states": torch.randn(1, 7, 32),
        "pooled_projections": torch.randn(1, 32), "timestep": torch.tensor([1.0]), "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(7, 3), "return_dict": False,
    }  # fmt: skip


def qwen_transformer() -> tuple[Any, dict[str, Any]]:
    """Batch of two, the second prompt shorter: a mask with a gap between text and image."""
    torch.manual_seed(0)
    model = diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=1, attention_head_dim=64, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(16, 24, 24),
    )  # fmt: skip
    return model.eval(), {
        "hidden_states": torch.randn(2, 16, 16), "encoder_hidden_states": torch.randn(2, 7, 16),
        "encoder_hidden_states_mask": torch.tensor([[1] * 7, [1, 1, 1, 0, 0, 0, 0]]).bool(),
        "timestep": torch.tensor([1.0, 1.0]), "img_shapes": [[(1, 4, 4)]] * 2, "return_dict": False,
    }  # fmt: skip


def unet() -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    model = diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, sample_size=8, in_channels=4, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(1, 2), cross_attention_dim=64, norm_num_groups=8,
    )  # fmt: skip
    return model.eval(), {
        "sample": torch.randn(1, 4, 8, 8), "timestep": 1, "encoder_hidden_states": torch.randn(1, 7, 64),
        "return_dict": False,
    }  # fmt: skip


def sd3_transformer() -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    model = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, num_layers=1, attention_head_dim=64, num_attention_heads=2,
        joint_attention_dim=32, caption_projection_dim=128, pooled_projection_dim=64, out_channels=4,
    )  # fmt: skip
    return model.eval(), {
        "hidden_states": torch.randn(1, 4, 8, 8), "encoder_hidden_states": torch.randn(1, 7, 32),
        "pooled_projections": torch.randn(1, 64), "timestep": torch.tensor([1.0]), "return_dict": False,
    }  # fmt: skip


def wan_transformer() -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=64, in_channels=4, out_channels=4, text_dim=32,
        freq_dim=64, ffn_dim=32, num_layers=1, rope_max_seq_len=32,
    )  # fmt: skip
    return model.eval(), {
        "hidden_states": torch.randn(1, 4, 2, 8, 8), "encoder_hidden_states": torch.randn(1, 7, 32),
        "timestep": torch.tensor([1.0]), "return_dict": False,
    }  # fmt: skip


def any_flow_transformer() -> tuple[Any, dict[str, Any]]:
    """Its self-attention builds a BlockMask and accepts only flex; its cross-attention takes any backend."""
    torch.manual_seed(0)
    model = diffusers.AnyFlowFARTransformer3DModel(
        patch_size=(1, 2, 2), compressed_patch_size=(1, 4, 4), full_chunk_limit=3, num_attention_heads=2,
        attention_head_dim=16, in_channels=4, out_channels=4, text_dim=16, freq_dim=32, ffn_dim=32, num_layers=1,
        cross_attn_norm=True, rope_max_seq_len=32, gate_value=0.25, deltatime_type="r",
    )  # fmt: skip
    return model.eval(), {
        "hidden_states": torch.randn(1, 4, 4, 16, 16), "timestep": torch.full((1, 4), 500.0),
        "r_timestep": torch.full((1, 4), 250.0), "encoder_hidden_states": torch.randn(1, 12, 16),
        "chunk_partition": [2, 2], "return_dict": False,
    }  # fmt: skip


def forward(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs)[0]
