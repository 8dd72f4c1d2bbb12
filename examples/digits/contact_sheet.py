"""Contact sheet of generated digits: one row per backend, one column per picture."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

SCALE = 4  # screen pixels per image pixel
GAP = 4
HEADER = 20
PAPER, TEXT, MISREAD = "white", "black", "red"


def write_contact_sheet(
    path: Path, rows: dict[str, torch.Tensor], asked: torch.Tensor, misread: dict[str, torch.Tensor]
) -> None:
    """Write the PNG.

    Args:
        path: File to write; its folder is created.
        rows: Label to ``(count, height, width)`` images, 0 (paper) to 1 (ink).
        asked: ``(count,)`` digits, written above the columns.
        misread: Label to ``(count,)`` bool; those pictures get a red frame.
    """
    font = ImageFont.load_default(size=12)
    label_width = int(max(font.getlength(label) for label in rows)) + 12
    side = next(iter(rows.values())).shape[-1] * SCALE
    cell = side + GAP
    sheet = Image.new("RGB", (label_width + len(asked) * cell, HEADER + len(rows) * cell), PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, digit in enumerate(asked.tolist()):
        draw.text((label_width + column * cell + side / 2, HEADER / 2), str(digit), TEXT, font, anchor="mm")
    for row, (label, images) in enumerate(rows.items()):
        top = HEADER + row * cell
        draw.text((6, top + side / 2), label, TEXT, font, anchor="lm")
        for column, image in enumerate(images):
            left = label_width + column * cell
            ink = (255 * (1 - image)).round().to(torch.uint8).numpy()
            sheet.paste(Image.fromarray(ink).resize((side, side), Image.Resampling.NEAREST), (left, top))
            if misread[label][column]:
                draw.rectangle((left, top, left + side - 1, top + side - 1), outline=MISREAD)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
