"""A small diffusers Flux transformer that draws handwritten digits, and the loop that samples it.

The model is diffusers' own ``FluxTransformer2DModel`` at toy size (two heads of 64), so every attention call takes the
route it takes in a full-size pipeline. The digit asked for is a prompt of ``CLASS_TOKENS`` learned vectors; they
join the 64 pixels of an 8x8 image in one sequence, as text tokens join image tokens in Flux.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

IMAGE_SIZE = 8
CLASSES = 10
ANY_DIGIT = CLASSES  # the prompt "some digit", for classifier-free guidance
CLASS_TOKENS = 4
PROMPT_DIM = 64

TRANSFORMER_CONFIG = {
    "patch_size": 1,
    "in_channels": 1,
    "num_layers": 1,
    "num_single_layers": 2,
    "attention_head_dim": 64,
    "num_attention_heads": 2,
    "joint_attention_dim": PROMPT_DIM,
    "pooled_projection_dim": PROMPT_DIM,
    "guidance_embeds": False,
    "axes_dims_rope": [16, 24, 24],
}

WEIGHTS = Path(__file__).with_name("digits.safetensors")
STEPS = 12
GUIDANCE = 1.5


class DigitGenerator(nn.Module):
    """``transformer`` (a ``FluxTransformer2DModel``) with the learned prompts of the ten digits.

    Args:
        config: Arguments of ``FluxTransformer2DModel``.
    """

    def __init__(self, config: dict | None = None) -> None:
        super().__init__()
        self.transformer = FluxTransformer2DModel(**(config or TRANSFORMER_CONFIG))
        self.class_prompts = nn.Embedding(CLASSES + 1, CLASS_TOKENS * PROMPT_DIM)
        rows, columns = torch.meshgrid(torch.arange(IMAGE_SIZE), torch.arange(IMAGE_SIZE), indexing="ij")
        pixel_ids = torch.stack([torch.ones_like(rows), rows, columns], dim=-1).reshape(-1, 3).float()
        self.register_buffer("pixel_ids", pixel_ids, persistent=False)
        self.register_buffer("prompt_ids", torch.zeros(CLASS_TOKENS, 3), persistent=False)

    def forward(self, noisy_pixels: torch.Tensor, sigma: torch.Tensor, digits: torch.Tensor) -> torch.Tensor:
        """Predict the velocity ``noise - image``.

        Args:
            noisy_pixels: ``(batch, 64, 1)``, ``(1 - sigma) * image + sigma * noise``, images in [-1, 1].
            sigma: ``(batch,)``, noise level in [0, 1].
            digits: ``(batch,)`` int64, 0-9, or ``ANY_DIGIT``.

        Returns:
            ``(batch, 64, 1)``.
        """
        prompt = self.class_prompts(digits).unflatten(-1, (CLASS_TOKENS, PROMPT_DIM))
        return self.transformer(
            hidden_states=noisy_pixels,
            encoder_hidden_states=prompt,
            pooled_projections=prompt.mean(dim=1),
            timestep=sigma,
            img_ids=self.pixel_ids,
            txt_ids=self.prompt_ids,
            return_dict=False,
        )[0]


def save_generator(generator: DigitGenerator, path: Path, state: dict[str, torch.Tensor] | None = None) -> None:
    """Write ``state`` (default: the generator's own) in float16, with the architecture in the file's metadata."""
    state = generator.state_dict() if state is None else state
    config = {name: generator.transformer.config[name] for name in TRANSFORMER_CONFIG}
    save_file(
        {name: tensor.half().contiguous() for name, tensor in state.items()},
        path,
        metadata={"transformer": json.dumps(config)},
    )


def load_generator(path: Path = WEIGHTS, device: str = "cpu", dtype: torch.dtype = torch.float32) -> DigitGenerator:
    """Read a file written by :func:`save_generator`, ready to sample.

    Raises:
        FileNotFoundError: ``path`` does not exist.
        RuntimeError: the weights do not fit the architecture named in the file.
    """
    if not path.exists():
        raise FileNotFoundError(f"no weights at {path}; train them with: python {Path(__file__).with_name('train.py')}")
    with safe_open(path, framework="pt") as file:
        generator = DigitGenerator(json.loads(file.metadata()["transformer"]))
    generator.load_state_dict(load_file(path))
    return generator.requires_grad_(False).eval().to(device, dtype)


@torch.inference_mode()
def sample_digits(
    generator: DigitGenerator,
    digits: torch.Tensor,
    seed: int,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    on_step: Callable[[], None] | None = None,
) -> torch.Tensor:
    """Draw one image per entry of ``digits`` with diffusers' ``FlowMatchEulerDiscreteScheduler``.

    The noise is drawn on the CPU in float32, so that a seed means the same picture on every device and backend.

    Args:
        generator: The model; it runs on its own device and in its own dtype.
        digits: ``(count,)`` int64, the digits asked for.
        seed: Seed of the starting noise.
        steps: Euler steps, one model call each.
        guidance: Classifier-free guidance scale; 1.0 switches it off and halves the work.
        on_step: Called after every step.

    Returns:
        ``(count, 8, 8)`` float32 on the CPU, 0 (paper) to 1 (ink).
    """
    device, dtype = generator.class_prompts.weight.device, generator.class_prompts.weight.dtype
    noise = torch.randn(len(digits), IMAGE_SIZE**2, 1, generator=torch.Generator().manual_seed(seed))
    sample, digits = noise.to(device), digits.to(device)
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps).tolist(), device=device)
    prompts = digits if guidance == 1.0 else torch.cat([digits, torch.full_like(digits, ANY_DIGIT)])
    for timestep in scheduler.timesteps:
        pixels = sample.to(dtype).repeat(len(prompts) // len(digits), 1, 1)
        sigma = (timestep / scheduler.config.num_train_timesteps).to(dtype).expand(len(prompts))
        velocity = generator(pixels, sigma, prompts).float()
        if guidance != 1.0:
            asked, any_digit = velocity.chunk(2)
            velocity = any_digit + guidance * (asked - any_digit)
        sample = scheduler.step(velocity, timestep, sample, return_dict=False)[0]
        if on_step is not None:
            on_step()
    return (sample.float().cpu().squeeze(-1).unflatten(-1, (IMAGE_SIZE, IMAGE_SIZE)) / 2 + 0.5).clamp(0, 1)
