"""The report as a browser shows it: from a file, with no network, in light, dark, narrow and print."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By

from benchmarks.browser import open_page, requests

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def grown(smoke: Path) -> Path:
    """The same run as if it had gone on with three ranks after step 6, and were not complete."""
    folder = smoke.parent / "<i>grown"
    folder.mkdir()
    records = [json.loads(line) for line in (smoke / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        record["ranks"] = 3 if record["step"] > 6 else 1
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


@pytest.fixture(scope="module")
def page(browser: webdriver.Chrome, smoke: Path, grown: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of a report on both."""
    file = tmp_path_factory.mktemp("report") / "page.html"
    command = [sys.executable, str(ROOT / "job" / "report.py"), str(smoke), str(grown), "--output", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return file.as_uri()


def emulate(browser: webdriver.Chrome, scheme: str = "light", media: str = "screen", width: int = 1280) -> None:
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def brightness(browser: webdriver.Chrome, what: str, of: str = "body") -> float:
    """Of a computed colour, from 0 to 255."""
    script = "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]].match(/[0-9.]+/g).slice(0, 3)"
    return sum(map(float, browser.execute_script(script, of, what))) / 3


def test_the_page_shows_the_result_of_the_run_and_asks_for_nothing_but_itself(
    browser: webdriver.Chrome, page: str, smoke: Path
) -> None:
    emulate(browser)
    open_page(browser, page)
    browser.get_log("browser"), requests(browser)
    browser.refresh()
    summary = json.loads((smoke / "summary.json").read_text())
    assert f"{summary['test_accuracy']:.4f}" in browser.find_element(By.TAG_NAME, "h1").text
    headings = [heading.text for heading in browser.find_elements(By.TAG_NAME, "h2")]
    assert headings == ["Curves", "The 2 runs", "Configuration", "Ranks over time", "Confusion matrix"]
    assert [address for address in requests(browser) if not address.startswith("data:")] == [page]
    assert browser.get_log("browser") == []


def test_the_table_has_a_row_for_each_run_and_names_are_text(browser: webdriver.Chrome, page: str, smoke: Path) -> None:
    emulate(browser)
    open_page(browser, page)
    rows = [
        [cell.text for cell in row.find_elements(By.CSS_SELECTOR, "th, td")]
        for row in browser.find_elements(By.CSS_SELECTOR, "table.runs tbody tr")
    ]
    summary = json.loads((smoke / "summary.json").read_text())
    assert rows[0][:5] == ["smoke", "complete", "1", "12", f"{summary['test_accuracy']:.4f}"]
    assert rows[1][:5] == ["<i>grown", "not complete", "1 → 3", "12", f"{summary['test_accuracy']:.4f}"]


def test_four_drawings_hold_a_curve_of_each_run_within_their_frame(browser: webdriver.Chrome, page: str) -> None:
    emulate(browser)
    open_page(browser, page)
    drawings = browser.find_elements(By.CSS_SELECTOR, "figure svg")
    titles = [drawing.get_attribute("aria-label").split(" of ")[0] for drawing in drawings]
    assert titles == ["Loss", "Accuracy", "Learning rate", "Images per second"]
    for drawing, title in zip(drawings, titles):
        assert title in [text.text for text in drawing.find_elements(By.TAG_NAME, "text")]
        frame, curves = drawing.rect, drawing.find_elements(By.CSS_SELECTOR, "path[style*='--run-']")
        colours = {curve.value_of_css_property("stroke") for curve in curves} - {"none"}
        assert len(colours) == 2 and frame["width"] > 300
        widest = max((curve.rect for curve in curves), key=lambda rect: float(rect["width"]))
        assert widest["width"] > frame["width"] / 2
        assert frame["x"] <= widest["x"] and widest["y"] + widest["height"] <= frame["y"] + frame["height"]


def test_the_bar_of_a_run_is_cut_where_its_ranks_changed(browser: webdriver.Chrome, page: str) -> None:
    emulate(browser)
    open_page(browser, page)
    spans = browser.find_elements(By.CSS_SELECTOR, ".bar:last-of-type span")[-2:]
    assert [span.text for span in spans] == ["1", "3"]
    assert spans[0].rect["width"] == pytest.approx(spans[1].rect["width"], abs=1)  # six steps each


def test_the_confusion_matrix_counts_every_test_image(browser: webdriver.Chrome, page: str, smoke: Path) -> None:
    emulate(browser)
    open_page(browser, page)
    matrix = browser.find_element(By.CSS_SELECTOR, "table.confusion")
    rows: list[Any] = [
        row.find_elements(By.TAG_NAME, "td") for row in matrix.find_elements(By.CSS_SELECTOR, "tbody tr")
    ]
    counts = [[int(cell.text) for cell in row[:-1]] for row in rows]
    assert [sum(row) for row in counts] == [1000] * 10
    right = sum(counts[place][place] for place in range(10))
    assert right / 10_000 == json.loads((smoke / "summary.json").read_text())["test_accuracy"]


def test_it_is_dark_on_a_dark_screen_and_light_on_paper(browser: webdriver.Chrome, page: str) -> None:
    for scheme, media, light in (("light", "screen", True), ("dark", "screen", False), ("dark", "print", True)):
        emulate(browser, scheme, media)
        open_page(browser, page)
        paper, ink = brightness(browser, "backgroundColor"), brightness(browser, "color")
        assert (paper > 200 and ink < 60) if light else (paper < 60 and ink > 200), (scheme, media)


@pytest.mark.parametrize("width", [360, 1280])
def test_the_page_is_never_wider_than_the_screen(browser: webdriver.Chrome, page: str, width: int) -> None:
    emulate(browser, width=width)
    open_page(browser, page)
    assert browser.execute_script("return document.documentElement.scrollWidth") == width
    for wide in browser.find_elements(By.CSS_SELECTOR, ".wide"):  # nor does a table scroll within it
        assert browser.execute_script("return arguments[0].scrollWidth <= arguments[0].clientWidth", wide)
