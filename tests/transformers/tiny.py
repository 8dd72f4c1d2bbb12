"""Tiny random models of real transformers classes."""

from __future__ import annotations

import torch
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

_DECODER = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_ENCODER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_WINDOWED = {**_DECODER, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}

MAKERS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_DECODER)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**{**_WINDOWED, "use_sliding_window": True})),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_DECODER)),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**_WINDOWED, attn_logit_softcapping=5.0, query_pre_attn_scalar=8)
    ),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**_WINDOWED, query_pre_attn_scalar=8)),
    "gpt_oss": lambda: GptOssForCausalLM(
        GptOssConfig(**_WINDOWED, num_local_experts=2, num_experts_per_tok=1)
    ),
    "bert": lambda: BertModel(BertConfig(vocab_size=64, max_position_embeddings=64, **_ENCODER)),
    "vit": lambda: ViTModel(ViTConfig(image_size=16, patch_size=4, **_ENCODER)),
    "clip": lambda: CLIPModel(
        CLIPConfig(
            text_config=CLIPTextConfig(vocab_size=64, max_position_embeddings=16, eos_token_id=2, **_ENCODER).to_dict(),
            vision_config=CLIPVisionConfig(image_size=16, patch_size=4, **_ENCODER).to_dict(),
            projection_dim=16,
        )
    ),
    "whisper": lambda: WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=64, num_mel_bins=8, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_source_positions=20,
            max_target_positions=32, decoder_start_token_id=1, pad_token_id=0, bos_token_id=1, eos_token_id=None,
            suppress_tokens=None, begin_suppress_tokens=None,
        )
    ),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(
            vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0,
            pad_token_id=0, eos_token_id=None,
        )
    ),
}  # fmt: skip

DECODERS = ("llama", "qwen2", "qwen3", "gemma3")


def make(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = MAKERS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # transformers starts so small that attention hardly matters.
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.3)
            elif name == "gpt_oss":
                parameter.normal_(1.0, 0.5)
    return model


def prompt() -> dict[str, torch.Tensor]:
    """Two sequences of 7 tokens, the first with 3 of padding on the left."""
    ids = torch.randint(3, 64, (2, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    ids[0, :3] = 0
    return {"input_ids": ids, "attention_mask": mask}


def inputs(name: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
    if name == "whisper":
        return {
            "input_features": torch.randn(2, 8, 40, generator=generator),
            "decoder_input_ids": prompt()["input_ids"],
        }
    if name == "bert":
        tokens = prompt()
        return {key: value.flip(1) for key, value in tokens.items()}
    if name == "clip":
        return {**inputs("bert"), **inputs("vit")}
    if name == "t5":
        return {**inputs("bert"), "decoder_input_ids": prompt()["input_ids"]}
    return prompt()
