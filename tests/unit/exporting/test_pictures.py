"""Any picture as the data set has them, and what is said of it."""

from __future__ import annotations

from pathlib import Path
from typing import Optional

import numpy as np
import pytest
from PIL import Image

from job.config import load_config
from job.data import idx
from job.data.dataset import FASHION_MNIST, Description
from job.data.pictures import Pictures
from job.errors import DataError
from job.exporting.pictures import files_in, prepare

COLOUR = Description(("a", "b"), (3, 8, 6))


@pytest.fixture(scope="module")
def pullover() -> np.ndarray:
    """A picture of the data set, which reaches its upper and lower edge and leaves a dark margin beside it."""
    return np.asarray(idx.load(load_config().data).test.images[1])


def saved(picture: Image.Image, folder: Path, name: str = "picture.png") -> Path:
    picture.save(folder / name)
    return folder / name


def photograph(pixels: np.ndarray) -> Image.Image:
    """The thing ten times as large, dark, on a white sheet that is neither square nor centred on it."""
    sheet = np.full((700, 400), 255, np.uint8)
    sheet[300:580, 40:320] = 255 - np.kron(pixels, np.ones((10, 10), np.uint8))
    return Image.fromarray(sheet)


def test_pictures_of_the_data_set_are_taken_as_they_are(tmp_path: Path) -> None:
    images = idx.load(load_config().data).test.images
    for number in range(0, 10_000, 25):
        found = prepare(saved(Image.fromarray(np.asarray(images[number])), tmp_path), FASHION_MNIST)
        assert found.done == "" and np.array_equal(found.pixels, images[number]), number


def test_a_photograph_on_a_light_ground_becomes_a_picture_of_the_data_set(tmp_path: Path, pullover: np.ndarray) -> None:
    found = prepare(saved(photograph(pullover).convert("RGB"), tmp_path, "photo.jpg"), FASHION_MNIST)
    assert found.done == "RGB to grey, negated, as its ground is light, 400x700 to 28x28"
    assert found.pixels.shape == (28, 28) and np.abs(found.pixels.astype(int) - pullover).mean() < 8
    assert np.abs(found.pixels.astype(int) - (255 - pullover.astype(int))).mean() > 80


def test_what_is_transparent_is_a_white_sheet(tmp_path: Path, pullover: np.ndarray) -> None:
    whole = photograph(pullover)
    layered = Image.merge("LA", [whole.point(lambda v: v * (v < 250)), whole.point(lambda v: 255 * (v < 250))])
    found = prepare(saved(layered, tmp_path), FASHION_MNIST)
    assert found.done.startswith("transparent parts made white, LA to grey, negated, as its ground is light")
    on_white = prepare(saved(whole, tmp_path, "whole.png"), FASHION_MNIST).pixels
    assert np.abs(found.pixels.astype(int) - on_white).max() <= 5  # where the thing itself is nearly white


def test_16_bits_keep_their_shades(tmp_path: Path, pullover: np.ndarray) -> None:
    found = prepare(saved(Image.fromarray(pullover.astype(np.uint16) * 257), tmp_path), FASHION_MNIST)
    assert np.array_equal(found.pixels, pullover) and found.done == "I;16 to grey"


def test_a_picture_that_lies_on_its_side_by_its_camera_is_turned(tmp_path: Path, pullover: np.ndarray) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees, clockwise
    Image.fromarray(np.rot90(pullover)).save(tmp_path / "turned.png", exif=exif)
    found = prepare(tmp_path / "turned.png", FASHION_MNIST)
    assert np.array_equal(found.pixels, pullover) and found.done == "turned upright"


@pytest.mark.parametrize(("invert", "expected"), [(None, None), (False, 120), (True, 135)])
def test_a_ground_that_is_neither_dark_nor_light_is_not_guessed(
    tmp_path: Path, invert: Optional[bool], expected: Optional[int]
) -> None:
    pixels = np.full((28, 28), 120, np.uint8)
    file = saved(Image.fromarray(pixels), tmp_path)
    if expected is None:
        with pytest.raises(DataError, match=r"cannot tell whether.* 120, 120, 120, 120; say it with --invert no"):
            prepare(file, FASHION_MNIST)
    else:
        assert (prepare(file, FASHION_MNIST, invert).pixels == expected).all()


def test_a_ground_that_is_dark_above_and_light_below_is_not_guessed(tmp_path: Path) -> None:
    pixels = np.zeros((28, 28), np.uint8)
    pixels[14:] = 255
    with pytest.raises(DataError, match=r"grey values of 0, 0, 255, 255"):
        prepare(saved(Image.fromarray(pixels), tmp_path), FASHION_MNIST)


class OneFile:
    """A data set of one picture, as training reads it."""

    labels = np.zeros(1, np.int64)

    def __init__(self, file: Path) -> None:
        self._file = file

    def read(self, index: int) -> bytes:
        return self._file.read_bytes()

    def name(self, index: int) -> str:
        return str(self._file)


@pytest.mark.parametrize(("mode", "size"), [("RGB", (6, 8)), ("L", (30, 20)), ("RGBA", (6, 8)), ("P", (9, 9))])
def test_for_other_data_a_picture_is_read_as_training_reads_it(
    tmp_path: Path, mode: str, size: tuple[int, int]
) -> None:
    random = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    file = saved(Image.fromarray(random).convert(mode), tmp_path)
    found = prepare(file, COLOUR)
    expected = Pictures(OneFile(file), COLOUR.shape, True)[np.array([0])][0]
    assert np.array_equal(found.pixels, expected.transpose(1, 2, 0))
    assert bool(found.done) == (mode != "RGB" or size != (6, 8))


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"hello", "not a picture"), (b"", "not a picture"), (None, "No such file"), (b"half", "a damaged picture")],
)
def test_what_is_no_picture_is_one_sentence(tmp_path: Path, content: Optional[bytes], words: str) -> None:
    file = tmp_path / "x.png"
    if content == b"half":
        saved(Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 50), np.uint8)), tmp_path, "x.png")
        file.write_bytes(file.read_bytes()[:1000])
    elif content is not None:
        file.write_bytes(content)
    with pytest.raises(DataError, match=f"{file}: {words}") as error:
        prepare(file, FASHION_MNIST)
    assert "\n" not in str(error.value)


def test_32_bits_and_an_empty_sheet_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has 32 bits a pixel"):
        prepare(saved(Image.fromarray(np.zeros((28, 28), np.float32)), tmp_path, "x.tiff"), FASHION_MNIST)
    with pytest.raises(DataError, match="shows nothing but its ground"):
        prepare(saved(Image.new("L", (50, 40), 255), tmp_path), FASHION_MNIST)


def test_a_folder_stands_for_the_pictures_below_it_in_order(tmp_path: Path) -> None:
    for name in ("b.png", "a/x.JPG", "a/notes.txt", ".hidden.png"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).touch()
    (tmp_path / "empty").mkdir()
    found = list(files_in([tmp_path / "z.txt", tmp_path / "in", tmp_path / "empty"]))
    assert [path.relative_to(tmp_path).as_posix() for path, _ in found] == ["z.txt", "in/a/x.JPG", "in/b.png", "empty"]
    assert [bool(wrong) for _, wrong in found] == [False, False, False, True]
