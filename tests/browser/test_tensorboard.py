"""What a person sees who starts TensorBoard over the runs: the real server, seen in a real browser."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver

from benchmarks.browser import find, open_page, tensorboard, wait, wait_for_words

pytestmark = pytest.mark.slow

# The distinct colours of a picture on the page.
COLOURS = """
const canvas = document.createElement('canvas');
[canvas.width, canvas.height] = [arguments[0].naturalWidth, arguments[0].naturalHeight];
const context = canvas.getContext('2d');
context.drawImage(arguments[0], 0, 0);
return new Set(new Uint32Array(context.getImageData(0, 0, canvas.width, canvas.height).data.buffer)).size;
"""


@pytest.fixture(scope="module")
def board(browser: webdriver.Chrome, smoke: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a TensorBoard over two runs: one, and its copy."""
    runs = tmp_path_factory.mktemp("board")
    for name in ("one", "two"):
        shutil.copytree(smoke / "tensorboard", runs / name / "tensorboard")
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    with tensorboard(runs) as address:
        yield address


@pytest.fixture(scope="module")
def summary(smoke: Path) -> dict[str, Any]:
    return dict(json.loads((smoke / "summary.json").read_text()))


def test_the_curves_of_both_runs_end_at_what_the_summary_says(
    browser: webdriver.Chrome, board: str, summary: dict[str, Any]
) -> None:
    open_page(browser, f"{board}?tagFilter=test/accuracy#timeseries")
    last = f"{summary['test_accuracy']:.4f}".rstrip("0")
    wait_for_words(browser, "one/tensorboard", "two/tensorboard", "test", "/accuracy", last)


def test_training_and_evaluation_share_a_chart(browser: webdriver.Chrome, board: str) -> None:
    open_page(browser, f"{board}#custom_scalars")
    wait_for_words(browser, "train and test", "loss", "accuracy", "Matches (4)")  # of each run, train and test


def test_every_scalar_is_in_a_group_that_folds(browser: webdriver.Chrome, board: str) -> None:
    open_page(browser, f"{board}#scalars")
    wait_for_words(browser, "train", "test", "optimizer", "throughput", "ranks", "memory", "memory/rss_bytes/0")


def test_the_pictures_of_the_confusion_and_of_the_mistakes_are_drawn(browser: webdriver.Chrome, board: str) -> None:
    open_page(browser, f"{board}#images")
    wait_for_words(browser, "test/confusion_matrix", "test/worst_mistakes")
    pictures = wait(
        browser,
        "four loaded pictures",
        lambda browser: (
            len(images := [image for image in find(browser, "img") if image.get_property("naturalWidth")]) == 4
            and images
        ),
    )
    assert all(browser.execute_script(COLOURS, picture) > 20 for picture in pictures)


def test_the_table_of_hyperparameters_has_a_row_for_each_run(
    browser: webdriver.Chrome, board: str, summary: dict[str, Any]
) -> None:
    open_page(browser, f"{board}#hparams")
    wait_for_words(browser, "optimizer.learning_rate", "ranks", "one/tensorboard", "two/tensorboard")
    wait_for_words(browser, f"{summary['test_accuracy']:#.5g}")


def test_the_projector_shows_the_features_of_test_images(browser: webdriver.Chrome, board: str) -> None:
    open_page(browser, f"{board}#projector")
    for _ in range(2):  # a frame in a frame
        browser.switch_to.frame(wait(browser, "the projector", lambda browser: find(browser, "iframe"))[0])
    wait_for_words(browser, "one/tensorboard", "two/tensorboard", "penultimate_features:00012", "256x128")


def test_histograms_graph_and_configuration_are_on_their_pages(browser: webdriver.Chrome, board: str) -> None:
    open_page(browser, f"{board}#histograms")
    wait_for_words(browser, "weights", "gradients", "batch_norm/1.running_mean")
    open_page(browser, f"{board}#graphs")
    wait_for_words(browser, "batchnorm0", "conv0", "dense0")
    open_page(browser, f"{board}#text")
    wait_for_words(browser, "config/text_summary", "train.max_steps", "12", "git commit")


def test_the_browser_meets_no_error(browser: webdriver.Chrome, board: str) -> None:
    for page in ("timeseries", "images"):
        open_page(browser, f"{board}#{page}")
        wait_for_words(browser, "Inactive")
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
