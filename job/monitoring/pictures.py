"""Pictures for people, drawn from arrays: pure functions.

Drawn with Pillow: a plotting library takes several times as long to draw them, and most of a second to load.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any, Union

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from job.training.evaluation import Mistake

_INK, _PALE, _RED = (30, 30, 30), (120, 120, 120), (190, 30, 30)
_BLUE = np.array([8, 64, 129])  # of a cell that holds its whole row
_SMALL, _PLAIN, _LARGE = 12, 14, 18  # sizes of type
_REMEMBERED_TEXTS = 4096  # a kilobyte or two each

_Ink = Union[str, tuple[int, int, int]]


def confusion_matrix(confusion: np.ndarray, names: Sequence[str], title: str) -> Image.Image:
    """Counts (classes, classes) of true (rows) and predicted (columns) classes, shaded by their part of the row."""
    classes, width, height, left, top = len(names), 58, 44, 130, 150
    canvas = Image.new("RGB", (left + classes * width + 80, top + classes * height + 20), "white")
    draw = ImageDraw.Draw(canvas)
    _write(canvas, title, (12, 10), _INK, _LARGE)
    _write(canvas, "true \\ predicted", (12, top - 24), _PALE, _SMALL)
    _write(canvas, "right", (left + classes * width + 12, top - 24), _PALE, _SMALL)
    parts = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    for row, name in enumerate(names):
        y = top + row * height
        _write(canvas, name, (left - 10, y + height // 2), _INK, anchor="rm")
        _write(canvas, f"{parts[row, row]:.1%}", (left + classes * width + 12, y + height // 2), _INK, anchor="lm")
        upwards = _mask(name, _PLAIN, degrees=45)
        canvas.paste(_INK, (left + row * width + width // 2 - 8, top - 6 - upwards.height), upwards)
        for column in range(classes):
            x = left + column * width
            shade = np.sqrt(parts[row, column])  # a root, for the few among the many
            colour = tuple((255 + shade * (_BLUE - 255)).astype(int).tolist())
            draw.rectangle((x, y, x + width - 2, y + height - 2), colour)
            if confusion[row, column]:
                ink = "white" if shade > 0.55 else _INK
                _write(canvas, str(confusion[row, column]), (x + width // 2, y + height // 2), ink, anchor="mm")
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
    _write(canvas, title, (12, 10), _INK, _LARGE)
    for place, (mistake, pixels) in enumerate(zip(mistakes, images)):
        x, y = 16 + place % columns * 146, top + place // columns * pitch
        canvas.paste(_shown(pixels).resize((side, side), Image.Resampling.NEAREST), (x, y))
        _write(canvas, f"{names[mistake.true]}", (x, y + side + 4), _INK)
        _write(canvas, f"as {names[mistake.predicted]}", (x, y + side + 20), _RED)
        _write(canvas, f"#{mistake.image}, loss {mistake.loss:.1f}", (x, y + side + 38), _PALE, _SMALL)
    return canvas


def in_few_colours(picture: Image.Image, coloured_images: bool) -> Image.Image:
    """In 256 colours, which makes a file of it half as large. White stays white.

    The colours are those of ink and shades; where the images in it are coloured, those that the picture has, which take
    five times as long to find.
    """
    if coloured_images:
        return picture.quantize(256, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    return picture.quantize(palette=_palette(), dither=Image.Dither.NONE)


def _shown(pixels: np.ndarray) -> Image.Image:
    """In colour if there are three channels; else of the first one the negative, which looks better on white."""
    if pixels.ndim == 3 and len(pixels) == 3:
        return Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    return Image.fromarray(255 - (pixels[0] if pixels.ndim == 3 else pixels))


def _write(
    canvas: Image.Image, text: str, place: tuple[int, int], ink: _Ink, size: int = _PLAIN, anchor: str = "la"
) -> None:
    """Write ``text`` at ``place``: of its left, middle or right (l, m, r), and of its top or middle (a, m)."""
    mask = _mask(text, size)
    left = place[0] - "lmr".index(anchor[0]) * mask.width // 2
    top = place[1] - "am".index(anchor[1]) * mask.height // 2
    canvas.paste(ink, (left, top), mask)


@lru_cache(_REMEMBERED_TEXTS)
def _mask(text: str, size: int, degrees: int = 0) -> Image.Image:
    """What ``text`` covers, from the top of its line to the bottom. Most texts come again in the next picture."""
    font = _font(size)
    mask = Image.new("L", (int(font.getbbox(text)[2]) + 2, sum(font.getmetrics())), 0)
    ImageDraw.Draw(mask).text((0, 0), text, 255, font)
    return mask.rotate(degrees, expand=True, resample=Image.Resampling.BICUBIC) if degrees else mask


@cache
def _font(size: int) -> Any:
    return ImageFont.load_default(size)


@cache
def _palette() -> Image.Image:
    """An image that has the colours: white to black, to red, and to blue.

    Pillow takes colours for the same whose parts are alike but for the last two bits, and looks for what is next to the
    darkest of them: 252 for white.
    """
    shades = np.linspace(0.04, 1, 96)[:, None]
    greys = np.repeat(np.append(np.arange(0, 252, 4), 255)[:, None], 3, axis=1)
    colours = np.concatenate([greys, *(255 + shades * (end - 255) for end in (np.array(_RED), _BLUE))])
    palette = Image.new("P", (1, 1))
    palette.putpalette(colours.round().astype(np.uint8).tobytes())
    return palette
