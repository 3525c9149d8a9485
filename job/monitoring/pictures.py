"""Pictures for people, drawn from arrays: pure functions.

Drawn with Pillow: a plotting library takes several times as long to draw them, and most of a second to load.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from job.training.evaluation import Mistake

_INK, _PALE, _RED = (30, 30, 30), (120, 120, 120), (190, 30, 30)
_BLUE = np.array([8, 64, 129])  # of a cell that holds its whole row
_SMALL, _PLAIN, _LARGE = 12, 14, 18  # sizes of type


def confusion_matrix(confusion: np.ndarray, names: Sequence[str], title: str) -> Image.Image:
    """Counts (classes, classes) of true (rows) and predicted (columns) classes, shaded by their part of the row."""
    classes, width, height, left, top = len(names), 58, 44, 130, 150
    canvas = Image.new("RGB", (left + classes * width + 80, top + classes * height + 20), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((12, 10), title, _INK, _font(_LARGE))
    draw.text((12, top - 24), "true \\ predicted", _PALE, _font(_SMALL))
    draw.text((left + classes * width + 12, top - 24), "right", _PALE, _font(_SMALL))
    parts = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    for row, name in enumerate(names):
        y = top + row * height
        draw.text((left - 10, y + height / 2), name, _INK, _font(_PLAIN), anchor="rm")
        draw.text(
            (left + classes * width + 12, y + height / 2), f"{parts[row, row]:.1%}", _INK, _font(_PLAIN), anchor="lm"
        )
        _slanted(canvas, name, (left + row * width + width // 2, top - 6))
        for column in range(classes):
            x = left + column * width
            shade = np.sqrt(parts[row, column])  # a root, for the few among the many
            colour = tuple((255 + shade * (_BLUE - 255)).astype(int).tolist())
            draw.rectangle((x, y, x + width - 2, y + height - 2), colour)
            if confusion[row, column]:
                ink = "white" if shade > 0.55 else _INK
                draw.text((x + width / 2, y + height / 2), str(confusion[row, column]), ink, _font(_PLAIN), anchor="mm")
    return canvas


def worst_mistakes(
    mistakes: Sequence[Mistake], images: Sequence[np.ndarray], names: Sequence[str], title: str
) -> Image.Image:
    """The images of mistakes in a grid, each with what it is, and what it was taken for.

    They are uint8 (height, width) or (channels, height, width).

    The loss of a sample is the negative logarithm of the probability that the network gave to the truth.
    """
    columns, side, pitch, top = 6, 112, 170, 44
    rows = max(-(-len(mistakes) // columns), 1)
    canvas = Image.new("RGB", (columns * 146 + 16, top + rows * pitch), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((12, 10), title, _INK, _font(_LARGE))
    for place, (mistake, pixels) in enumerate(zip(mistakes, images)):
        x, y = 16 + place % columns * 146, top + place // columns * pitch
        canvas.paste(_shown(pixels).resize((side, side), Image.Resampling.NEAREST), (x, y))
        draw.text((x, y + side + 4), f"{names[mistake.true]}", _INK, _font(_PLAIN))
        draw.text((x, y + side + 20), f"as {names[mistake.predicted]}", _RED, _font(_PLAIN))
        draw.text((x, y + side + 38), f"#{mistake.image}, loss {mistake.loss:.1f}", _PALE, _font(_SMALL))
    return canvas


def _shown(pixels: np.ndarray) -> Image.Image:
    """In colour if there are three channels; else of the first one the negative, which looks better on white."""
    if pixels.ndim == 3 and len(pixels) == 3:
        return Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    return Image.fromarray(255 - (pixels[0] if pixels.ndim == 3 else pixels))


def _slanted(canvas: Image.Image, text: str, foot: tuple[int, int]) -> None:
    """Write ``text`` upwards at 45 degrees from ``foot``."""
    _, _, right, bottom = _font(_PLAIN).getbbox(text)
    mask = Image.new("L", (int(right) + 2, int(bottom) + 2), 0)
    ImageDraw.Draw(mask).text((0, 0), text, 255, _font(_PLAIN))
    mask = mask.rotate(45, expand=True, resample=Image.Resampling.BICUBIC)
    canvas.paste(_INK, (foot[0] - 8, foot[1] - mask.height), mask)


@cache
def _font(size: int) -> Any:
    return ImageFont.load_default(size)
