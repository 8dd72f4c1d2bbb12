"""diffusers' own call for context parallelism on tiny pipelines, run inside a world of two processes."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers import ContextParallelConfig
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput

from attention_dispatch.integrations import diffusers as integration
from tests.diffusers.models import forward, sd3_transformer
from tests.diffusers.pipelines import build, denoiser, draw

from .product import relative_error
from .worlds import outcome

CASES = {
    f"{name} {scheme} {backend}": (name, scheme, backend)
    for name in ("flux", "wan")
    for scheme in ("ring", "ulysses")
    for backend in ("", "reference", "auto")
}


def config(scheme: str) -> ContextParallelConfig:
    return ContextParallelConfig(**{f"{scheme}_degree": 2})


def built(name: str) -> tuple[Any, dict[str, Any]]:
    """Pipeline and arguments; Wan 6 tokens instead of 3, since diffusers gathers equal parts only over gloo."""
    pipeline, arguments = build(name)
    return pipeline, {**arguments, "width": 32} if name == "wan" else arguments


def picture(name: str, scheme: str, backend: str, alone: torch.Tensor) -> float:
    """Relative difference of the pipeline's result to the one that a single process drew with diffusers alone."""
    pipeline, arguments = built(name)
    model = denoiser(pipeline)
    if backend:
        model.set_attention_backend(backend)
    model.enable_parallelism(config=config(scheme))
    found = draw(pipeline, arguments)
    return relative_error(found, alone.double())


def without_attribute(scheme: str) -> float:
    """SD3, whose attention takes no ``_parallel_config``, with a plan that splits its inputs."""
    model, inputs = sd3_transformer()
    wanted = forward(model, {**inputs, "encoder_hidden_states": inputs["encoder_hidden_states"][:, :6]})
    split = {0: ContextParallelInput(split_dim=1, expected_dims=3, split_output=True)}
    gathered = ContextParallelOutput(gather_dim=1, expected_dims=3)
    model.enable_parallelism(config=config(scheme),
                             cp_plan={"pos_embed": split, "context_embedder": split, "proj_out": gathered})
    found = forward(model, {**inputs, "encoder_hidden_states": inputs["encoder_hidden_states"][:, :6]})
    return relative_error(found, wanted.double())


def run_pictures(rank: int) -> dict[str, Any]:
    # diffusers (0.42) divides by the number of accelerators, which is 0 here.
    torch.accelerator.device_count = lambda: 1
    diffusers.utils.logging.set_verbosity_error()
    integration.deactivate()
    alone = {}
    for name in ("flux", "wan"):
        pipeline, arguments = built(name)
        alone[name] = draw(pipeline, arguments)
    integration.activate()
    found = {case: outcome(lambda case=case: picture(*CASES[case], alone[CASES[case][0]])) for case in CASES}
    found.update({f"sd3 {scheme}": outcome(lambda scheme=scheme: without_attribute(scheme))
                  for scheme in ("ring", "ulysses")})
    return found
