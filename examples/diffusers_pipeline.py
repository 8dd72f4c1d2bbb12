"""A diffusers pipeline with a policy: the transformer by denoising step, the VAE by itself.

    python examples/diffusers_pipeline.py

The pipeline is a tiny Flux with random weights, so its picture is noise. With a pipeline of yours, only the lines that
make it change.
"""

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

import attention_dispatch as ad
from attention_dispatch import policies

STEPS = 6


def make_pipeline() -> FluxPipeline:
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=2, attention_head_dim=64, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[16, 24, 24],
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(32,), norm_num_groups=4, latent_channels=1, sample_size=32, shift_factor=0.0, scaling_factor=1.0
    )
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae.eval(), transformer=transformer.eval(),
        text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def main() -> None:
    pipeline = make_pipeline()
    prompt = {"prompt_embeds": torch.randn(1, 8, 32), "pooled_prompt_embeds": torch.randn(1, 32)}

    def picture(**arguments):
        generator = torch.Generator().manual_seed(1)
        size = {"height": 8, "width": 8, "num_inference_steps": STEPS, "output_type": "np"}
        return pipeline(**prompt, **size, generator=generator, **arguments).images

    expected = picture()
    # A plain request routes every model of diffusers in the pipeline.
    print(ad.set_attention_backend(pipeline, "native"))
    print(f"largest difference of a pixel: {abs(picture() - expected).max():.1e}\n")

    # The transformer precise at both ends of the run and fast in between; on a GPU, "triton_sage" in the middle.
    policy = policies.components(
        transformer=policies.steps({"0:1": "reference", "1:-1": "native", "-1:": "reference"}, total=STEPS), vae="native"
    )
    print(ad.set_attention_backend(pipeline, policy))
    with policies.at_step(0):
        again = picture(callback_on_step_end=policies.advance_step)
    print(f"largest difference of a pixel: {abs(again - expected).max():.1e}")
    ad.reset_attention_backend(pipeline)


if __name__ == "__main__":
    main()
