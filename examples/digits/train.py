"""Train the digit generator on scikit-learn's scanned digits by class-conditional flow matching, on the CPU.

    python examples/digits/train.py                      # minutes on two cores; rewrites digits.safetensors
    python examples/digits/train.py --steps 2 --output /tmp/digits.safetensors

Flow matching (https://arxiv.org/abs/2210.02747): between an image ``x`` and noise ``e`` lies
``(1 - sigma) x + sigma e``; the model learns the velocity ``e - x``. One prompt in ten is replaced by "some
digit", so that sampling can use classifier-free guidance (https://arxiv.org/abs/2207.12598). The saved weights are an
exponential moving average. The same seed gives the same weights on the same machine and thread count.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from digit_generator import ANY_DIGIT, CLASSES, WEIGHTS, DigitGenerator, load_generator, sample_digits, save_generator
from digit_reader import DigitReader, load_scanned_digits
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

WARM_UP_STEPS = 50
PROMPT_DROP = 0.1
AVERAGE_DECAY = 0.995


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up, then half a cosine down to zero."""
    return peak * min(1.0, (step + 1) / WARM_UP_STEPS) * 0.5 * (1 + math.cos(math.pi * step / steps))


def flow_matching_loss(generator: DigitGenerator, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean squared error of the velocity at noise levels drawn from a logit-normal.

    Args:
        generator: The model being trained.
        images: ``(batch, 8, 8)`` in [0, 1].
        labels: ``(batch,)`` int64.
    """
    pixels = images.flatten(1).unsqueeze(-1) * 2 - 1
    noise = torch.randn_like(pixels)
    sigma = torch.sigmoid(torch.randn(len(pixels)))  # https://arxiv.org/abs/2403.03206, section 3.1
    noisy = torch.lerp(pixels, noise, sigma[:, None, None])
    prompts = torch.where(torch.rand(len(pixels)) < PROMPT_DROP, ANY_DIGIT, labels)
    return (generator(noisy, sigma, prompts) - (noise - pixels)).square().mean()


def train(steps: int, batch_size: int, peak_learning_rate: float, seed: int, output: Path) -> None:
    """Train from scratch and write the averaged weights to ``output``."""
    torch.manual_seed(seed)
    scanned = load_scanned_digits()
    generator = DigitGenerator()
    optimizer = torch.optim.AdamW(generator.parameters(), lr=peak_learning_rate, weight_decay=0.01)
    average = {name: tensor.detach().clone() for name, tensor in generator.state_dict().items()}
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        task = progress.add_task("training", total=steps, loss=float("nan"))
        recent_loss = None
        for step in range(steps):
            chosen = torch.randint(len(scanned.images), (batch_size,))
            loss = flow_matching_loss(generator, scanned.images[chosen], scanned.labels[chosen])
            optimizer.param_groups[0]["lr"] = learning_rate(step, steps, peak_learning_rate)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(generator.parameters(), 1.0)
            optimizer.step()
            decay = min(AVERAGE_DECAY, (step + 1) / (step + 10))
            for name, tensor in generator.state_dict().items():
                average[name].lerp_(tensor, 1 - decay)
            recent_loss = loss.item() if recent_loss is None else 0.98 * recent_loss + 0.02 * loss.item()
            progress.update(task, advance=1, loss=recent_loss)
    save_generator(generator, output, average)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1500, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, help="images per step (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="peak learning rate (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, batches and noise (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=WEIGHTS, help="file to write (default: %(default)s)")
    arguments = parser.parse_args()
    train(arguments.steps, arguments.batch_size, arguments.learning_rate, arguments.seed, arguments.output)

    reader = DigitReader(load_scanned_digits())
    asked = torch.arange(CLASSES).repeat(10)
    drawn = sample_digits(load_generator(arguments.output), asked, seed=1)
    print(f"wrote {arguments.output} ({arguments.output.stat().st_size / 1e6:.2f} MB)")
    print(f"the reader reads {reader.held_out_accuracy:.1%} of held-out real digits correctly")
    print(f"and {reader.accuracy(drawn, asked):.1%} of {len(asked)} generated digits as the digit asked for")


if __name__ == "__main__":
    main()
