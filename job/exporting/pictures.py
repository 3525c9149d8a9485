"""A picture file as the pixels that a model expects, and what had to be done to it for that."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Optional

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from job.data.dataset import Description
from job.data.pictures import ENDINGS
from job.errors import DataError

DARK, LIGHT = 26, 229  # grey values up to which, and from which on, a corner is of a dark or of a light ground
_FUZZ = 13  # grey values by which a ground varies: 5 % of all, as the makers of Fashion-MNIST chose


class Prepared(NamedTuple):
    """Pixels for a model, and in words what was done to get them; empty if nothing was."""

    pixels: np.ndarray  # uint8 (height, width) or (height, width, 3)
    done: str


def prepare(file: Path, about: Description, invert: Optional[bool] = None) -> Prepared:
    """Read a picture and bring it to the data set's size and mode.

    Where the data set shows light things on a dark ground (``about.ground``), a photograph goes the way that the
    pictures of Fashion-MNIST went (Xiao et al., 2017, section 2): cut to the thing, its longer side made to fit, put
    into the middle, and negated if the ground is light. Otherwise it is resized as training resizes.

    Args:
        file: of any format that Pillow reads.
        about: the data set.
        invert: whether to negate; None: as the ground of the picture says.

    Raises:
        DataError: it is no picture, or it cannot be known what it shows; the message says what to do.
    """
    picture, frames = _opened(file)
    done = [f"first of {frames} frames"] if frames > 1 else []
    if picture.mode in ("I", "F"):
        raise DataError(f"{file}: has 32 bits a pixel, and what is white is not known; make it one of 8 or 16 bits")
    channels, height, width = about.shape
    mode = "L" if channels == 1 else "RGB"
    size = picture.size
    if about.ground:
        picture, more = _as_fashion(picture, file, about, invert)
        done += more
    elif picture.mode != mode:
        done.append(f"{picture.mode} to {mode}")
        picture = picture.convert(mode)
    if picture.size != (width, height):
        picture = picture.resize((width, height), Image.Resampling.BILINEAR)
    if size != (width, height):
        done.append(f"{size[0]}x{size[1]} to {width}x{height}")
    if invert and not about.ground:
        picture = ImageOps.invert(picture)
        done.append("negated")
    return Prepared(np.asarray(picture), ", ".join(done))


def _opened(file: Path) -> tuple[Image.Image, int]:
    """The picture, decoded whole, and how many there are in the file."""
    try:
        with Image.open(file) as picture:
            picture.load()
            return picture.copy(), getattr(picture, "n_frames", 1)
    except UnidentifiedImageError:
        raise DataError(f"{file}: not a picture") from None
    except Exception as error:  # of Pillow's many kinds
        why = error.strerror if isinstance(error, OSError) and error.strerror else f"a damaged picture: {error}"
        raise DataError(f"{file}: {why}") from None


def files_in(named: Sequence[Path]) -> Iterator[tuple[Path, str]]:
    """The files that are named, and in place of a folder the pictures in it and below it, in the order of names.

    With each comes what is wrong with it, where that is known already: a folder without a picture.
    """
    for path in named:
        if not os.path.isdir(path):
            yield path, ""
            continue
        found = sorted(
            Path(folder) / name
            for folder, _, names in os.walk(path)
            for name in names
            if name.lower().endswith(ENDINGS) and name[0] != "."
        )
        yield from ((file, "") for file in found)
        if not found:
            yield path, f"{path}: holds no picture ({', '.join(ENDINGS)})"


def _as_fashion(
    picture: Image.Image, file: Path, about: Description, invert: Optional[bool]
) -> tuple[Image.Image, list[str]]:
    done = []
    upright = ImageOps.exif_transpose(picture)
    if upright.size != picture.size or upright.tobytes() != picture.tobytes():
        done.append("turned upright")
    if "A" in upright.getbands() or "transparency" in upright.info:
        done.append("transparent parts made white")
        over = Image.new("RGBA", upright.size, "white")
        over.alpha_composite(upright.convert("RGBA"))
        upright = over
    if picture.mode != "L":
        done.append(f"{picture.mode} to grey")
    grey = _of_16_bits(upright) if picture.mode.startswith("I;16") else upright.convert("L")
    light = _ground_is_light(grey, file) if invert is None else invert
    if light:
        done.append("negated" if invert else "negated, as its ground is light")
        grey = ImageOps.invert(grey)
    _, height, width = about.shape
    return (grey if grey.size == (width, height) else _cut_out(grey, file, (width, height))), done


def _of_16_bits(picture: Image.Image) -> Image.Image:
    """Pillow's own conversion makes white of all that is brighter than 255 of 65,535."""
    return Image.fromarray((np.asarray(picture).astype(np.uint16) >> 8).astype(np.uint8))


def _ground_is_light(grey: Image.Image, file: Path) -> bool:
    """By its corners. All pictures of Fashion-MNIST have two dark ones or more, and none that is light."""
    corners = _corners(grey)
    dark, light = (corners <= DARK).sum(), (corners >= LIGHT).sum()
    if dark >= 2 and not light:
        return False
    if light >= 2 and not dark:
        return True
    raise DataError(
        f"{file}: cannot tell whether its ground is dark or light: the corners have grey values of"
        f" {', '.join(f'{value:.0f}' for value in corners)}; say it with --invert no (dark) or --invert yes (light)"
    )


def _corners(grey: Image.Image) -> np.ndarray:
    """The mean grey values (4,) of squares in the corners."""
    values = np.asarray(grey, np.float64)
    side = max(1, min(values.shape) // 20)
    return np.array([values[rows, columns].mean() for rows in _ends(side) for columns in _ends(side)])


def _ends(side: int) -> tuple[slice, slice]:
    return slice(0, side), slice(-side, None)


def _cut_out(grey: Image.Image, file: Path, size: tuple[int, int]) -> Image.Image:
    """The thing on its dark ground, as large as fits, in the middle."""
    ground = int(np.median(_corners(grey)))
    box = grey.point([255 * (value > ground + _FUZZ) for value in range(256)]).getbbox()
    if box is None:
        raise DataError(f"{file}: shows nothing but its ground")
    return ImageOps.pad(grey.crop(box), size, Image.Resampling.HAMMING, ground)
