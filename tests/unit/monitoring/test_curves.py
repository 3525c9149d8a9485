"""The drawings, read back as XML: every value at its place, every run in its colour."""

from __future__ import annotations

import math
import random
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from job.monitoring.curves import PLOTS, Plot, draw
from job.monitoring.history import History

PLOT = {plot.key: plot for plot in PLOTS}


def history(name: str, values: list[float], split: str = "train", key: str = "learning_rate") -> History:
    records = [{"step": 10 * place, "split": split, key: value} for place, value in enumerate(values, 1)]
    return History(name, records, {}, {})


def drawn(plot: Plot, *runs: History) -> str:
    svg = draw(plot, runs)
    assert svg is not None
    return svg


def lines(svg: str, place: int) -> list[np.ndarray]:
    """The vertices of each line in the colour of the run in that place."""
    root = ElementTree.fromstring(svg.replace("<svg ", '<svg xmlns:xlink="xlink" ', 1))
    paths = [path for path in root.iter("path") if "clip-path" in path.attrib]
    return [
        np.array([[float(x), float(y)] for x, y in re.findall(r"[ML] (\S+) (\S+)", path.attrib["d"])])
        for path in paths
        if f"stroke: var(--run-{place})" in path.attrib["style"]
    ]


def test_every_record_is_a_point_at_its_step_and_value() -> None:
    generator = random.Random(1)
    values = [generator.random() for _ in range(20)]
    (line,) = lines(drawn(PLOT["learning_rate"], history("a", values)), 0)
    assert np.diff(line[:, 0]) == pytest.approx(np.diff(line[:, 0])[0])
    slope, offset = np.polyfit(values, line[:, 1], 1)
    assert slope < 0 and np.array(values) * slope + offset == pytest.approx(line[:, 1], abs=1e-3)


def test_a_loss_is_drawn_by_its_logarithm() -> None:
    values = [2.0, 0.9, 0.5, 0.4]
    (line,) = lines(drawn(PLOT["loss"], history("a", values, "test", "loss")), 0)
    slope, offset = np.polyfit(np.log(values), line[:, 1], 1)
    assert np.log(values) * slope + offset == pytest.approx(line[:, 1], abs=1e-3)


def test_runs_share_one_scale_and_each_has_its_colour() -> None:
    svg = drawn(PLOT["learning_rate"], history("a", [0.1, 0.2]), history("b", [0.2, 0.1]))
    (first,), (second,) = lines(svg, 0), lines(svg, 1)
    assert first[:, 1] == pytest.approx(second[::-1, 1])


def test_many_training_records_are_drawn_twice_the_mean_of_neighbours_over_the_records_themselves() -> None:
    values = [0.5 + 0.1 * (-1) ** place for place in range(300)]  # reach 5: the mean of 11 differs by 0.1/11 from 0.5
    records, mean = lines(drawn(PLOT["accuracy"], history("a", values, key="accuracy")), 0)
    inner = mean[np.isclose(mean[:, 0], mean[0, 0] + (mean[-1, 0] - mean[0, 0]) / 2, atol=50)]
    assert np.ptp(inner[:, 1]) == pytest.approx(np.ptp(records[:, 1]) / 11, rel=0.01)


def test_a_value_that_is_not_finite_is_a_gap() -> None:
    svg = drawn(PLOT["learning_rate"], history("a", [0.1, 0.2, math.nan, 0.2, 0.1]))
    assert re.search(r'd="M [^"]*M [^"]*" clip-path[^>]*var\(--run-0\)', svg)


def test_nothing_to_draw_is_no_drawing() -> None:
    assert draw(PLOT["loss"], [history("a", [0.1])]) is None
    assert draw(PLOT["learning_rate"], [history("a", [math.nan])]) is None


def test_a_drawing_has_only_the_colours_of_the_page_its_words_as_text_and_the_same_bytes_again() -> None:
    runs = [history("a $x$ <b>", [0.1, 0.2, 0.3])]
    svg = drawn(PLOT["learning_rate"], *runs)
    assert not re.search(r"#[0-9a-f]{6}|rgb\(|http", svg)
    assert ">Learning rate</text>" in svg and ">step</text>" in svg and "a $x$ &lt;b&gt;" in svg
    assert svg == drawn(PLOT["learning_rate"], *runs)


def test_drawings_on_one_page_share_no_names() -> None:
    runs = [history("a", [0.1, 0.2]), history("b", [1.0, 2.0], "test", "loss")]
    first, second = (set(re.findall(r'\bid="([^"]+)"', drawn(PLOT[key], *runs))) for key in ("learning_rate", "loss"))
    assert first and second and not first & second
