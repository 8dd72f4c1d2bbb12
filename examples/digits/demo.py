"""Draw the same digits with every attention backend of this machine, and compare.

    python examples/digits/demo.py
    python examples/digits/demo.py --backends native flex --json

A small diffusers Flux transformer samples the same seed once per backend, routed with
``attention_dispatch.set_attention_backend(model, name)``, and once more under ``with attention_backend(name)``. The
table shows what each backend costs and how far its pictures are from those of ``native``. A backend that cannot run
here is listed with the reason and the fix.

The exit status is 1 if ``native`` draws unreadable digits, if a backend disagrees with ``native`` beyond what rounding
explains, or if the two ways of choosing a backend give different pictures.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from comparison import BASELINE, Outcome, as_data, judge, largest_difference, refusals_table, results_table
from contact_sheet import write_contact_sheet
from digit_generator import CLASSES, STEPS, DigitGenerator, load_generator, sample_digits
from digit_reader import DigitReader, load_scanned_digits
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import attention_dispatch
import attention_dispatch.integrations.diffusers  # routes diffusers' own dispatcher through attention_dispatch
from attention_dispatch import registry
from attention_dispatch.request import current

# An exact backend may lie this many times farther from native than native lies from itself in the next wider dtype.
# Attention that is wrong by one key or by 10 % of scale changes pixels by more than 0.5.
ROUNDING_FACTOR = 5
FILE_WIDTH = 100  # columns of a table that does not go to a terminal
SMALLEST_LIMIT = 1e-5  # of a pixel, 0 to 1
WIDER = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.float32: torch.float64}


class Sampler:
    """Draws the digits asked for with one generator, timing every step."""

    def __init__(self, generator: DigitGenerator, asked: torch.Tensor, seed: int, steps: int) -> None:
        self.generator = generator
        self.asked = asked
        self.seed = seed
        self.steps = steps

    def draw(self, on_step: Callable[[], None]) -> tuple[torch.Tensor, float]:
        """The images ``(count, 8, 8)`` and the seconds of the fastest step."""
        ends = [time.perf_counter()]

        def step_done() -> None:
            if self.generator.pixel_ids.is_cuda:
                torch.cuda.synchronize()
            ends.append(time.perf_counter())
            on_step()

        images = sample_digits(self.generator, self.asked, self.seed, self.steps, on_step=step_done)
        return images, min(after - before for before, after in pairwise(ends))


@contextmanager
def served_calls() -> Iterator[list[str]]:
    """Collects the name of the backend that ran, for every attention call that reaches the dispatcher."""
    served: list[str] = []

    def note(call: Any, spec: Any, request: Any, plan: Any, output: Any) -> Any:
        served.append(plan.backend.name)
        return output

    current.observer = note
    current.refresh()
    try:
        yield served
    finally:
        current.observer = None
        current.refresh()


def run_backend(sampler: Sampler, name: str, on_step: Callable[[], None]) -> Outcome:
    """Draw with one backend, through the model's setting and under a ``with`` scope.

    Which backend ran is observed on one step of the first and all of the second; the timed run is not observed.
    """
    outcome = Outcome(name, registry.get(name).quantised)
    status = attention_dispatch.backend_status(name)
    if not status.available:
        outcome.reasons = [(reason.what, reason.fix) for reason in status.reasons]
        return outcome
    try:
        draw_both_ways(sampler, outcome, on_step)
    except (attention_dispatch.BackendRejectedError, attention_dispatch.BackendUnavailableError) as refusal:
        outcome.images = None
        outcome.reasons = [(reason.what, reason.fix) for reason in refusal.reasons]
    except Exception as crash:  # a broken kernel must not hide what the others do
        outcome.images = None
        outcome.reasons = [(f"it crashed: {type(crash).__name__}: {crash}", "use another backend, and report this")]
        outcome.faults.append(f"crashed: {type(crash).__name__}")
    return outcome


def draw_both_ways(sampler: Sampler, outcome: Outcome, on_step: Callable[[], None]) -> None:
    """Fill in the images, times and calls of an outcome."""
    model, name = sampler.generator.transformer, outcome.name
    one_step = Sampler(sampler.generator, sampler.asked, sampler.seed, steps=1)
    report = attention_dispatch.set_attention_backend(model, name)
    try:
        with served_calls() as served_by_setting:
            one_step.draw(lambda: None)
        outcome.images, outcome.step_seconds = sampler.draw(on_step)
    finally:
        attention_dispatch.reset_attention_backend(model)
    with attention_dispatch.attention_backend(name), served_calls() as served_by_scope:
        scoped, _ = sampler.draw(on_step)
    outcome.scope_difference = largest_difference(outcome.images, scoped)
    outcome.calls = served_by_setting.count(name) + served_by_scope.count(name)
    expected = len(report.routed) * (1 + sampler.steps)
    if outcome.calls != expected or report.left:
        outcome.faults.append(f"it served {outcome.calls} of {expected} attention calls; not routed: {report.left}")


def rounding_limit(sampler: Sampler, baseline: Outcome, on_step: Callable[[], None]) -> float:
    """Largest pixel difference between two exact backends that rounding explains.

    Draws the baseline's pictures once more in the next wider dtype; the distance between the two is what rounding does
    to these pictures.
    """
    device, dtype = sampler.generator.pixel_ids.device, sampler.generator.class_prompts.weight.dtype
    wider = load_generator(device=str(device), dtype=WIDER[dtype])
    with attention_dispatch.attention_backend(BASELINE):
        images, _ = Sampler(wider, sampler.asked, sampler.seed, sampler.steps).draw(on_step)
    return max(SMALLEST_LIMIT, ROUNDING_FACTOR * largest_difference(images, baseline.images))


def compare_backends(
    sampler: Sampler, names: list[str], reader: DigitReader, console: Console
) -> tuple[list[Outcome], float]:
    """Run every backend, ``BASELINE`` first; also returns the pixel difference that rounding explains."""
    names = [BASELINE, *(name for name in names if name != BASELINE)]
    columns = TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(BASELINE, total=(2 * len(names) + 1) * sampler.steps)

        def on_step() -> None:
            progress.advance(task)

        outcomes = []
        for index, name in enumerate(names):
            progress.update(task, description=name)
            outcomes.append(run_backend(sampler, name, on_step))
            if outcomes[0].images is None:
                raise SystemExit(f"{BASELINE} did not run: {outcomes[0].reasons}")
            progress.update(task, completed=2 * (index + 1) * sampler.steps)
        progress.update(task, description=f"{BASELINE}, wider dtype")
        limit = rounding_limit(sampler, outcomes[0], on_step)
    judge(outcomes, outcomes[0], limit, sampler.asked, reader)
    return outcomes, limit


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cuda = torch.cuda.is_available()
    parser.add_argument("--backends", nargs="+", metavar="NAME", help="only these (default: every registered backend)")
    parser.add_argument("--count", type=int, default=40, help="digits to draw (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=STEPS, help="sampling steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if cuda else "cpu", help="default here: %(default)s")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], help="default: bfloat16, on cpu float32")
    parser.add_argument("--output", type=Path, default=Path("output/digits.png"), help="PNG (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables; progress goes to stderr")
    chosen = parser.parse_args(arguments)
    if chosen.count < 1 or chosen.steps < 1:
        parser.error("--count and --steps must be at least 1")
    try:
        chosen.backends = chosen.backends or list(attention_dispatch.list_backends())
        for name in chosen.backends:
            registry.get(name)
    except attention_dispatch.UnknownBackendError as unknown:
        parser.error(str(unknown))
    if chosen.dtype is None:
        chosen.dtype = "float32" if chosen.device == "cpu" else "bfloat16"
    return chosen


def main(arguments: list[str] | None = None) -> int:
    chosen = parse_arguments(arguments)
    generator = load_generator(device=chosen.device, dtype=getattr(torch, chosen.dtype))
    reader = DigitReader(load_scanned_digits())
    asked = (torch.arange(chosen.count) * CLASSES).div(chosen.count, rounding_mode="floor")
    sampler = Sampler(generator, asked, chosen.seed, chosen.steps)
    outcomes, limit = compare_backends(sampler, chosen.backends, reader, Console(stderr=True))

    ran = {outcome.name: outcome.images for outcome in outcomes if outcome.images is not None}
    misread = {name: reader.read(images.nan_to_num()) != asked for name, images in ran.items()}
    write_contact_sheet(chosen.output, ran, asked, misread)

    if chosen.json:
        print(json.dumps(as_data(outcomes, reader, chosen.dtype, chosen.device, limit, chosen.output), indent=2))
    else:
        console = Console(width=None if sys.stdout.isatty() else FILE_WIDTH)
        console.print(results_table(outcomes, chosen.dtype, chosen.device, limit))
        if len(ran) < len(outcomes):
            console.print(refusals_table(outcomes))
        for outcome in outcomes:
            for fault in outcome.faults:
                console.print(f"[red]{outcome.name}[/]: {escape(fault)}")
        console.print(
            f"The reader reads {reader.held_out_accuracy:.1%} of held-out real digits correctly.", highlight=False
        )
        console.print(f"Contact sheet: {chosen.output.resolve()}", soft_wrap=True)
    return 1 if any(outcome.faults for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
