"""The pictures of what a run shows: ``python -m benchmarks.screenshots``, about 3 minutes on two cores.

Trains three small runs, the same on two ranks and on one, four and two in turn, and one that learns more slowly, and
takes docs/images/tensorboard_*.png and report_*.png of them in a headless Chromium. Runs that are there are used.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image
from selenium import webdriver
from selenium.common.exceptions import TimeoutException
from selenium.webdriver.support.ui import WebDriverWait

from benchmarks.browser import MISSING, chromium, find, open_page, tensorboard, wait, wait_for_words
from benchmarks.runs import IMAGES, ROOT

FOLDER = ROOT / "runs" / "benchmarks" / "pictures"
# In float64, where the number of ranks changes nothing that a picture could show (docs/sync_batch_norm.md).
SETTINGS = [
    "model.dtype=float64", "data.global_batch=64", "optimizer.momentum=0.9", "train.epochs=1",
    "train.log_every_steps=5",
]  # fmt: skip
STOPS = (160, 310, 470)  # steps after which a run is evaluated, and goes on with another number of ranks, or the same
RUNS = {  # the ranks between the stops, and the learning rate
    "two-ranks": ((2, 2, 2), 0.02),
    "one-four-two-ranks": ((1, 4, 2), 0.02),
    "slower": ((2, 2, 2), 0.002),
}
SETTLE_SECONDS = 15.0


def main() -> None:
    """Train what is missing, and take all pictures."""
    if MISSING:
        sys.exit(f"error: {MISSING}")
    for name, (ranks, learning_rate) in RUNS.items():
        _train(FOLDER / name, ranks, learning_rate)
    IMAGES.mkdir(parents=True, exist_ok=True)
    with chromium(1280, 887) as browser:
        with tensorboard(FOLDER.relative_to(ROOT)) as address:  # the page shows the path
            _take_all_runs(browser, address)
        with tensorboard((FOLDER / "two-ranks").relative_to(ROOT)) as address:
            _take_one_run(browser, address)
        _take_report(browser)


def _train(folder: Path, ranks: Sequence[int], learning_rate: float) -> None:
    """Go on to each stop in turn, with its number of ranks; stops that the run has passed are left out."""
    summary = folder / "summary.json"
    for stop, number in zip(STOPS, ranks):
        if not summary.exists() or json.loads(summary.read_text())["steps"] < stop:
            arguments = [f"run.dir={folder}", *SETTINGS, f"optimizer.learning_rate={learning_rate}"]
            command = [str(ROOT / "launch" / "local.sh"), "-np", str(number), *arguments, f"train.max_steps={stop}"]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        print(f"{folder.name}: at step {stop}", flush=True)


def _take_all_runs(browser: webdriver.Chrome, address: str) -> None:
    open_page(browser, f"{address}#custom_scalars")
    wait_for_words(browser, "train and test", "Matches (6)")
    _save(browser, "tensorboard_scalars")
    _resize(browser, 1900, 560)  # so wide that the metrics are seen beside the hyperparameters
    open_page(browser, f"{address}#hparams")
    wait_for_words(browser, "slower/tensorboard")
    _save(browser, "tensorboard_hparams")
    _resize(browser, 1280, 744)


def _take_one_run(browser: webdriver.Chrome, address: str) -> None:
    open_page(browser, f"{address}#images")
    wait_for_words(browser, "test/confusion_matrix", "test/worst_mistakes")
    _save(browser, "tensorboard_images")
    open_page(browser, f"{address}#projector")
    for _ in range(2):  # a frame in a frame
        browser.switch_to.frame(wait(browser, "the projector", lambda browser: find(browser, "iframe"))[0])
    wait_for_words(browser, "500x128")
    browser.switch_to.default_content()
    _save(browser, "tensorboard_projector")


def _take_report(browser: webdriver.Chrome) -> None:
    page = FOLDER / "report.html"
    folders = [str(FOLDER / name) for name in RUNS]
    subprocess.run([sys.executable, str(ROOT / "job" / "report.py"), *folders, "--output", str(page)], check=True)
    _resize(browser, 1060, 900)
    open_page(browser, page.as_uri())
    bottom = browser.execute_script("return document.querySelector('#runs').getBoundingClientRect().bottom")
    _resize(browser, 1060, round(bottom) + 20)
    _save(browser, "report_curves")
    bottom = browser.execute_script(
        "document.querySelector('#ranks').scrollIntoView();"
        "return document.querySelector('.matrices > div').getBoundingClientRect().bottom"
    )
    _resize(browser, 1060, round(bottom) + 20)
    browser.execute_script("document.querySelector('#ranks').scrollIntoView()")
    _save(browser, "report_ranks")


def _resize(browser: webdriver.Chrome, width: int, height: int) -> None:
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def _save(browser: webdriver.Chrome, name: str) -> None:
    """Save what is on the page, once it has come to rest."""
    try:
        WebDriverWait(browser, SETTLE_SECONDS, poll_frequency=1.0).until(_same_twice())
    except TimeoutException:
        print(f"{name}: moves on and on; taken as it is")
    picture = Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("RGB")
    picture.save(IMAGES / f"{name}.png", optimize=True)
    print(f"{name}.png: {(IMAGES / f'{name}.png').stat().st_size / 1000:.0f} kB", flush=True)


def _same_twice() -> Callable[[webdriver.Chrome], bool]:
    last = b""

    def same(browser: webdriver.Chrome) -> bool:
        nonlocal last
        before, last = last, browser.get_screenshot_as_png()
        return last == before

    return same


if __name__ == "__main__":
    main()
