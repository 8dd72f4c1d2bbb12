"""What each backend did with the same digits, whether that is right, and how it is shown."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from digit_reader import DigitReader
from rich import box
from rich.markup import escape
from rich.table import Table

BASELINE = "native"
LEAST_ACCURACY = 0.90
# A quantised backend draws its own version of a digit; it must still be read as the same one.
LEAST_QUANTISED_AGREEMENT = 0.90


@dataclass
class Outcome:
    """What one backend did.

    Attributes:
        name: The backend.
        quantised: Whether it rounds its operands to 8 bits or fewer.
        images: ``(count, 8, 8)``, 0 to 1, drawn through ``set_attention_backend``; None if it did not run.
        step_seconds: Time of the fastest sampling step; other programs disturb the slower ones.
        calls: Attention calls it was seen to serve.
        scope_difference: Largest pixel difference between the model's setting and the ``with`` scope.
        difference: Largest pixel difference to the baseline.
        agreement: Share of pictures read as the same digit as the baseline's.
        accuracy: Share of pictures read as the digit asked for.
        reasons: Why it did not run: pairs (what, fix).
        faults: What is wrong with its pictures; empty if nothing is.
    """

    name: str
    quantised: bool
    images: torch.Tensor | None = None
    step_seconds: float = 0.0
    calls: int = 0
    scope_difference: float = 0.0
    difference: float = 0.0
    agreement: float = 0.0
    accuracy: float = 0.0
    reasons: list[tuple[str, str]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def largest_difference(images: torch.Tensor, others: torch.Tensor) -> float:
    """Largest absolute pixel difference; infinite if a pixel is not a number."""
    difference = (images - others).abs().max().item()
    return math.inf if math.isnan(difference) else difference


def judge(outcomes: list[Outcome], baseline: Outcome, limit: float, asked: torch.Tensor, reader: DigitReader) -> None:
    """Compare every outcome with the baseline and note its faults.

    Args:
        outcomes: Those with images are compared.
        baseline: The outcome of ``BASELINE``.
        limit: Largest pixel difference that rounding explains.
        asked: ``(count,)`` digits asked for.
        reader: Classifier of the pictures.
    """
    expected = reader.read(baseline.images)
    for outcome in outcomes:
        if outcome.images is None:
            continue
        read = reader.read(outcome.images.nan_to_num())
        outcome.difference = largest_difference(outcome.images, baseline.images)
        outcome.agreement = (read == expected).float().mean().item()
        outcome.accuracy = (read == asked).float().mean().item()
        if math.isinf(outcome.difference):
            outcome.faults.append("some pixels are not numbers")
        elif outcome.quantised:
            if outcome.agreement < LEAST_QUANTISED_AGREEMENT:
                outcome.faults.append(f"only {outcome.agreement:.0%} are read as {BASELINE}'s")
        elif outcome.difference > limit:
            outcome.faults.append(f"pixels differ by {outcome.difference:.2g}; rounding explains {limit:.2g}")
        if outcome.scope_difference > limit:
            outcome.faults.append(f"the with scope draws other pictures (by {outcome.scope_difference:.2g})")
    if baseline.accuracy < LEAST_ACCURACY:
        baseline.faults.append(f"only {baseline.accuracy:.0%} are read as the digit asked for")


def results_table(outcomes: list[Outcome], dtype: str, device: str, limit: float) -> Table:
    """The backends that ran."""
    table = Table(title=f"the same seed with every backend, on {device}", box=box.SIMPLE_HEAD, collapse_padding=True)
    table.add_column("backend", no_wrap=True)
    table.add_column("dtype")
    measures = ["ms, best\nstep", "calls", "max pixel\ndifference", f"read as\n{BASELINE}'s", "read as\nasked"]
    for heading in measures:
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("")
    for outcome in outcomes:
        if outcome.images is None:
            continue
        table.add_row(
            outcome.name,
            dtype + ("\nquantised" if outcome.quantised else ""),
            f"{outcome.step_seconds * 1e3:.1f}",
            str(outcome.calls),
            f"{outcome.difference:.1e}",
            f"{outcome.agreement:.0%}",
            f"{outcome.accuracy:.0%}",
            "[red]wrong[/]" if outcome.faults else "[green]ok[/]",
        )
    table.caption = f"Pixels are 0 to 1. Rounding explains differences to {BASELINE} up to {limit:.1e}."
    return table


def refusals_table(outcomes: list[Outcome]) -> Table:
    """The backends that could not run, why, and what to do; those with the same reasons share a row."""
    groups: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for outcome in outcomes:
        if outcome.images is None:
            groups.setdefault(tuple(outcome.reasons), []).append(outcome.name)
    table = Table(title="not run on this machine", box=box.SIMPLE_HEAD)
    for heading in ("backend", "why", "what to do"):
        table.add_column(heading, overflow="fold")
    for reasons, names in groups.items():
        causes, fixes = zip(*reasons, strict=True)
        table.add_row("\n".join(names), escape("\n".join(causes)), escape("\n".join(dict.fromkeys(fixes))))
    return table


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def as_data(outcomes: list[Outcome], reader: DigitReader, dtype: str, device: str, limit: float, sheet: Path) -> dict:
    """Everything the tables say, for ``--json``; a difference is None where a pixel is not a number."""
    return {
        "device": device,
        "dtype": dtype,
        "contact_sheet": str(sheet),
        "reader_held_out_accuracy": reader.held_out_accuracy,
        "pixel_difference_explained_by_rounding": limit,
        "ran": [
            {
                "backend": outcome.name,
                "quantised": outcome.quantised,
                "best_step_milliseconds": outcome.step_seconds * 1e3,
                "attention_calls": outcome.calls,
                "largest_pixel_difference": _finite(outcome.difference),
                "scope_pixel_difference": _finite(outcome.scope_difference),
                "agreement": outcome.agreement,
                "accuracy": outcome.accuracy,
                "faults": outcome.faults,
            }
            for outcome in outcomes
            if outcome.images is not None
        ],
        "not_run": [
            {"backend": outcome.name, "reasons": [{"what": what, "fix": fix} for what, fix in outcome.reasons]}
            for outcome in outcomes
            if outcome.images is None
        ],
    }
