"""The attention calls of real models, as data, for benchmarks and for tuning without the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..call import AttentionCall
from ..masks import Mask

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "float64": torch.float64}
MASKS = ("none", "key_padding", "bool", "bias", "key_bias")


class Shape(NamedTuple):
    """One attention call.

    Attributes:
        name: for tables. batch, q_len, k_len, heads, kv_heads, head_dim: sizes.
        causal: top-left causal masking. mask: one of :data:`MASKS`; ``"bool"`` and ``"bias"`` are (1, 1, Q, K),
            ``"key_bias"`` is additive and the same for every query, (B, H, 1, K). grad: forward and backward.
        dtype: a key of :data:`DTYPES`.
    """

    name: str
    batch: int
    q_len: int
    k_len: int
    heads: int
    kv_heads: int
    head_dim: int
    causal: bool = False
    mask: str = "none"
    grad: bool = False
    dtype: str = "bfloat16"

    @property
    def flops(self) -> float:
        """Floating point operations: 4·B·H·Q·K·D, half of it under causal masking, 3.5 times with the backward pass."""
        pairs = self.q_len * self.k_len / (2 if self.causal else 1)
        return 4.0 * self.batch * self.heads * pairs * self.head_dim * (3.5 if self.grad else 1.0)

    def __str__(self) -> str:
        lengths = str(self.q_len) if self.q_len == self.k_len else f"{self.q_len}q/{self.k_len}k"
        heads = str(self.heads) if self.heads == self.kv_heads else f"{self.heads}/{self.kv_heads}"
        extras = [self.dtype, *(["causal"] if self.causal else []), *([self.mask] if self.mask != "none" else [])]
        extras += ["fwd+bwd"] if self.grad else []
        text = f"{self.batch}x{lengths} H{heads} D{self.head_dim} {' '.join(extras)}"
        return f"{self.name}: {text}" if self.name else text


class Model(NamedTuple):
    """The calls of one model and where their sizes come from."""

    title: str
    shapes: tuple[Shape, ...]
    source: str


def _self(name: str, batch: int, length: int, heads: int, head_dim: int, **facts: Any) -> Shape:
    return Shape(name, batch, length, length, heads, heads, head_dim, **facts)


def _cross(name: str, batch: int, q_len: int, k_len: int, heads: int, head_dim: int, **facts: Any) -> Shape:
    return Shape(name, batch, q_len, k_len, heads, heads, head_dim, **facts)


def tokens(width: int, height: int, frames: int = 1, *, pixels: int, per_latent: int = 1) -> int:
    """Tokens of an image or a video.

    Args:
        width, height: in pixels.
        frames: of a video.
        pixels: side of the square that one token stands for: the spatial factor of the VAE times the patch size.
        per_latent: temporal factor of the VAE; it keeps the first frame apart.
    """
    return (width // pixels) * (height // pixels) * ((frames - 1) // per_latent + 1)


def _wan(width: int, height: int) -> tuple[Shape, ...]:
    """Guidance runs the two prompts one after the other."""
    length = tokens(width, height, 81, pixels=8 * 2, per_latent=4)
    return _self("self", 1, length, 40, 128), _cross("text", 1, length, 512, 40, 128)


_QWEN = tokens(1328, 1328, pixels=8 * 2)
_LTX = tokens(704, 512, 161, pixels=32, per_latent=8)
_SDXL = tokens(1024, 1024, pixels=8 * 2), tokens(1024, 1024, pixels=8 * 4)

MODELS: dict[str, Model] = {
    "flux": Model(
        "FLUX.1-dev, 1024x1024",
        (_self("joint", 1, tokens(1024, 1024, pixels=8 * 2) + 512, 24, 128),),
        "VAE 8x, patches of 2, 512 T5 tokens; huggingface.co/black-forest-labs/FLUX.1-dev transformer/config.json",
    ),
    "qwen-image": Model(
        "Qwen-Image, 1328x1328",
        (
            _self("joint", 1, _QWEN + 256, 24, 128),
            _self("joint, two prompts", 2, _QWEN + 256, 24, 128, mask="key_padding"),
        ),
        "VAE 8x, patches of 2, prompts of up to 256 tokens assumed, padded only where they differ in length; "
        "huggingface.co/Qwen/Qwen-Image transformer/config.json",
    ),
    "wan-480p": Model(
        "Wan 2.1 14B, 832x480, 81 frames",
        _wan(832, 480),
        "VAE 4x8x8, patches of 1x2x2, 512 text tokens; huggingface.co/Wan-AI/Wan2.1-T2V-14B config.json",
    ),
    "wan-720p": Model(
        "Wan 2.1 14B, 1280x720, 81 frames",
        _wan(1280, 720),
        "VAE 4x8x8, patches of 1x2x2, 512 text tokens; huggingface.co/Wan-AI/Wan2.1-T2V-14B config.json",
    ),
    "hunyuan-video": Model(
        "HunyuanVideo, 1280x720, 129 frames",
        (_self("joint", 1, tokens(1280, 720, 129, pixels=8 * 2, per_latent=4) + 256, 24, 128, mask="key_padding"),),
        "VAE 4x8x8, patches of 1x2x2, 256 text tokens; "
        "huggingface.co/hunyuanvideo-community/HunyuanVideo transformer/config.json",
    ),
    "ltx": Model(
        "LTX-Video, 704x512, 161 frames, with guidance",
        (_self("self", 2, _LTX, 32, 64), _cross("text", 2, _LTX, 128, 32, 64, mask="key_bias")),
        "VAE 8x32x32, no patches, 128 text tokens; huggingface.co/Lightricks/LTX-Video transformer/config.json",
    ),
    "sdxl": Model(
        "SDXL, 1024x1024 with guidance",
        (
            _self("64x64 self", 2, _SDXL[0], 10, 64, dtype="float16"),
            _self("32x32 self", 2, _SDXL[1], 20, 64, dtype="float16"),
            _cross("64x64 text", 2, _SDXL[0], 77, 10, 64, dtype="float16"),
            _cross("32x32 text", 2, _SDXL[1], 77, 20, 64, dtype="float16"),
        ),
        "VAE 8x, attention where 640 and 1280 channels are at 1/2 and 1/4 of the latent's size; "
        "huggingface.co/stabilityai/stable-diffusion-xl-base-1.0 unet/config.json",
    ),
    "llama-3-8b": Model(
        "Llama 3 8B",
        (
            Shape("prefill", 1, 8192, 8192, 32, 8, 128, causal=True),
            Shape("decode", 16, 1, 8192, 32, 8, 128),
            Shape("train", 1, 4096, 4096, 32, 8, 128, causal=True, grad=True),
        ),
        "32 heads, 8 for keys, 8192 positions; huggingface.co/meta-llama/Meta-Llama-3-8B config.json",
    ),
    "vit-l": Model(
        "ViT-L/16, 224x224",
        (
            _self("inference", 64, tokens(224, 224, pixels=16) + 1, 16, 64),
            _self("train", 64, tokens(224, 224, pixels=16) + 1, 16, 64, grad=True),
        ),
        "196 patches and a class token; huggingface.co/google/vit-large-patch16-224 config.json",
    ),
    "baselines": Model(
        "nine shapes of this project's measurements",
        (
            _self("", 2, 4096, 24, 128),
            _self("", 1, 16384, 24, 128),
            _self("", 2, 4096, 24, 64),
            _self("", 1, 16384, 24, 64),
            _self("", 1, 16384, 24, 128, causal=True),
            _cross("", 1, 32768, 512, 24, 128),
            _self("", 1, 4096, 24, 128),
            _self("", 1, 1024, 24, 128),
            _self("", 1, 4250, 24, 128, mask="key_padding"),
        ),
        "benchmarks/kernels.py",
    ),
    "tiny": Model(
        "small calls for a first look, float32",
        (
            _self("self", 1, 256, 4, 64, dtype="float32"),
            _self("padded", 2, 128, 4, 64, mask="key_padding", dtype="float32"),
        ),
        "made up",
    ),
}


def of_model(name: str) -> Model:
    """A model by name.

    Raises:
        ValueError: no such model; the message lists them.
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}. Known: {', '.join(MODELS)}.")
    return MODELS[name]


def read(file: Path) -> list[Shape]:
    """Shapes from a JSON list of objects whose keys are the fields of :class:`Shape`; ``k_len``, ``kv_heads`` and
    ``name`` may be left out.

    Raises:
        ValueError: not such a list.
    """
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
        return [
            Shape(**{"name": "", "k_len": row["q_len"], "kv_heads": row["heads"], **row})  # type: ignore[arg-type]
            for row in rows
        ]
    except (OSError, TypeError, KeyError, ValueError) as error:
        raise ValueError(
            f'{file} is not a list of shapes ({error}). Example: [{{"batch": 1, "q_len": 4096, "heads": 24, "head_dim": 128}}]'
        ) from error


def inputs(shape: Shape, device: torch.device, seed: int = 0) -> AttentionCall:
    """Random tensors of a shape; keys carry an offset per channel of 2 standard deviations, as diffusion transformers'
    keys do. Padding hides the last quarter of the keys."""
    generator = torch.Generator(device=device).manual_seed(seed)
    dtype = DTYPES[shape.dtype]

    def tensor(length: int, heads: int) -> Tensor:
        size = (shape.batch, length, heads, shape.head_dim)
        return torch.randn(size, generator=generator, device=device, dtype=dtype)

    query = tensor(shape.q_len, shape.heads)
    key = tensor(shape.k_len, shape.kv_heads)
    value = tensor(shape.k_len, shape.kv_heads)
    key += 2.0 * torch.randn((1, 1, *key.shape[2:]), generator=generator, device=device, dtype=dtype)
    for leaf in (query, key, value):
        leaf.requires_grad_(shape.grad)
    return AttentionCall(
        query,
        key,
        value,
        _mask(shape, device, dtype),
        is_causal=shape.causal,
        scale=shape.head_dim**-0.5,
        enable_gqa=shape.heads != shape.kv_heads,
    )


def _mask(shape: Shape, device: torch.device, dtype: torch.dtype) -> Mask | None:
    if shape.mask == "none":
        return None
    visible = torch.arange(shape.k_len, device=device) < max(1, shape.k_len * 3 // 4)
    if shape.mask == "key_padding":
        return Mask("key_padding", visible.expand(shape.batch, -1).contiguous())
    if shape.mask == "key_bias":
        hidden = torch.zeros(shape.k_len, device=device, dtype=dtype).masked_fill(~visible, -10000.0)
        return Mask("bias", hidden.expand(shape.batch, shape.heads, 1, -1).contiguous())
    keep = visible.expand(1, 1, shape.q_len, -1).contiguous()
    if shape.mask == "bool":
        return Mask("bool", keep)
    return Mask("bias", torch.zeros(keep.shape, device=device, dtype=dtype).masked_fill(~keep, float("-inf")))
