"""The scanned digits of scikit-learn (1797 images, 8x8, 16 grey levels) and a nearest-neighbour reader of them.

The images ship inside scikit-learn; nothing is downloaded. Source of the data:
https://archive.ics.uci.edu/dataset/80/optical+recognition+of+handwritten+digits
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.neighbors import KNeighborsClassifier


@dataclass(frozen=True)
class ScannedDigits:
    """Real digits, 0 (paper) to 1 (ink); a fifth is held out of all training, the generator's included."""

    images: torch.Tensor  # (1437, 8, 8) float32
    labels: torch.Tensor  # (1437,) int64
    held_out_images: torch.Tensor  # (360, 8, 8) float32
    held_out_labels: torch.Tensor  # (360,) int64


def load_scanned_digits() -> ScannedDigits:
    """Load scikit-learn's digits, split the same way every time."""
    pixels, labels = load_digits(return_X_y=True)
    train_pixels, test_pixels, train_labels, test_labels = train_test_split(
        pixels, labels, test_size=360, random_state=0, stratify=labels
    )

    def as_images(rows) -> torch.Tensor:
        return torch.tensor(rows / 16, dtype=torch.float32).reshape(-1, 8, 8)

    return ScannedDigits(
        as_images(train_pixels), torch.tensor(train_labels), as_images(test_pixels), torch.tensor(test_labels)
    )


class DigitReader:
    """A three-nearest-neighbour classifier fitted on real digits.

    Attributes:
        held_out_accuracy: Share of the held-out real digits it reads correctly.
    """

    def __init__(self, scanned: ScannedDigits) -> None:
        self._neighbours = KNeighborsClassifier(n_neighbors=3).fit(scanned.images.flatten(1).numpy(), scanned.labels)
        self.held_out_accuracy = self.accuracy(scanned.held_out_images, scanned.held_out_labels)

    def read(self, images: torch.Tensor) -> torch.Tensor:
        """Digits read from ``(count, 8, 8)`` images in [0, 1]: ``(count,)`` int64."""
        return torch.as_tensor(self._neighbours.predict(images.flatten(1).numpy()))

    def accuracy(self, images: torch.Tensor, labels: torch.Tensor) -> float:
        """Share of ``images`` read as ``labels``."""
        return (self.read(images) == labels).float().mean().item()
