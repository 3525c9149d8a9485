"""Pictures: what stands where in the pixels."""

from __future__ import annotations

import numpy as np
from PIL import Image

from job.data.dataset import FASHION_MNIST
from job.monitoring.pictures import confusion_matrix, in_few_colours, worst_mistakes
from job.training.evaluation import Mistake

WHITE = np.array([255, 255, 255])


def corner_of_cell(picture: np.ndarray, row: int, column: int) -> np.ndarray:
    """A pixel of a cell that no number covers."""
    return picture[150 + row * 44 + 3, 130 + column * 58 + 3].astype(int)


def test_a_cell_is_the_darker_the_larger_its_part_of_the_row() -> None:
    confusion = np.diag(np.full(10, 50))
    confusion[2] = [0, 0, 60, 0, 30, 0, 10, 0, 0, 0]
    picture = np.asarray(confusion_matrix(confusion, FASHION_MNIST.classes, "title"))
    assert picture.dtype == np.uint8 and picture.shape[2] == 3
    shades = [int(corner_of_cell(picture, 2, column).sum()) for column in (2, 4, 6, 0)]
    assert shades == sorted(shades) and len(set(shades)) == 4
    assert (corner_of_cell(picture, 2, 0) == WHITE).all()
    assert (corner_of_cell(picture, 4, 4) == corner_of_cell(picture, 9, 9)).all()  # whole rows
    assert corner_of_cell(picture, 4, 4).sum() < shades[0]


def test_rows_are_true_and_columns_predicted() -> None:
    confusion = np.zeros((10, 10), int)
    confusion[1, 7] = 5
    picture = np.asarray(confusion_matrix(confusion, FASHION_MNIST.classes, "title"))
    assert not (corner_of_cell(picture, 1, 7) == WHITE).all()
    assert (corner_of_cell(picture, 7, 1) == WHITE).all()


def test_every_number_and_every_name_leaves_ink() -> None:
    blank = np.asarray(confusion_matrix(np.zeros((10, 10), int), [""] * 10, ""))
    named = np.asarray(confusion_matrix(np.zeros((10, 10), int), FASHION_MNIST.classes, ""))
    for row in range(10):
        beside = np.s_[150 + row * 44 : 150 + row * 44 + 44, :130]
        above = np.s_[100:150, 130 + row * 58 : 130 + row * 58 + 58]
        assert (blank[beside] != named[beside]).any() and (blank[above] != named[above]).any()
    counted = np.asarray(confusion_matrix(np.full((10, 10), 123), FASHION_MNIST.classes, ""))
    for row in range(10):
        for column in range(10):
            cell = counted[150 + row * 44 : 150 + row * 44 + 42, 130 + column * 58 : 130 + column * 58 + 56]
            assert len(np.unique(cell.reshape(-1, 3), axis=0)) > 5  # shade, ink, and the edges of the digits


def test_numbers_are_in_the_middle_of_their_cells_and_names_end_beside_their_rows() -> None:
    picture = np.asarray(confusion_matrix(np.full((10, 10), 808), FASHION_MNIST.classes, "")).astype(int).sum(axis=2)
    for row in range(10):
        top = 150 + row * 44
        cell = picture[top : top + 42, 130 + row * 58 : 130 + row * 58 + 56]
        down, across = np.nonzero(cell < 300)
        assert abs((across.min() + across.max()) / 2 - 29) <= 2 and abs((down.min() + down.max()) / 2 - 22) <= 3
        down, across = np.nonzero(picture[top : top + 44, :130] < 300)
        assert 114 <= across.max() <= 121 and abs((down.min() + down.max()) / 2 - 22) <= 4


def test_the_grid_of_mistakes_shows_the_images_in_their_order_dark_on_white() -> None:
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (8, 28, 28), dtype=np.uint8)
    mistakes = [Mistake(place, place % 10, (place + 1) % 10, 3.0) for place in range(8)]
    picture = np.asarray(worst_mistakes(mistakes, images, FASHION_MNIST.classes, "title"))
    for place, image in enumerate(images):
        x, y = 16 + place % 6 * 146, 44 + place // 6 * 170
        shown = picture[y : y + 112, x : x + 112]
        np.testing.assert_array_equal(shown[2::4, 2::4], np.repeat(255 - image[..., None], 3, axis=2))
        caption = picture[y + 114 : y + 165, x : x + 130].reshape(-1, 3).astype(int)
        assert (caption[:, 0] - caption[:, 1] > 100).any()  # what it was taken for is red


def test_without_mistakes_there_is_still_a_picture() -> None:
    assert worst_mistakes([], [], FASHION_MNIST.classes, "no mistakes").height > 100


def test_every_grey_stays_what_it_is_in_few_colours_or_almost() -> None:
    greys = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16)[..., None], 3, axis=2)
    few = in_few_colours(Image.fromarray(greys), coloured_images=False)
    assert few.mode == "P"
    shown = np.asarray(few.convert("RGB")).astype(int)
    np.testing.assert_allclose(shown, greys.astype(int), rtol=0, atol=3)
    assert (shown[-1, -1] == WHITE).all()


def test_coloured_images_keep_their_colours_in_few_colours() -> None:
    levels = np.arange(4, dtype=np.uint8) * 85
    colours = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(8, 8, 3)
    few = in_few_colours(Image.fromarray(np.tile(colours, (4, 4, 1))), coloured_images=True)
    shown = np.asarray(few.convert("RGB")).astype(int)
    np.testing.assert_allclose(shown, np.tile(colours, (4, 4, 1)).astype(int), rtol=0, atol=16)
