"""The report: what it says, read back with an HTML parser, and how the command ends."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Optional

import pytest

from job.monitoring.history import read_runs
from job.report import page

ROOT = Path(__file__).resolve().parents[2]
# Diagonal but for 3 shirts (6) taken for T-shirts (0) and 1 coat (4) taken for a pullover (2).
CONFUSION = [[10 if row == column else 0 for column in range(10)] for row in range(10)]
CONFUSION[6][6], CONFUSION[6][0] = 7, 3
CONFUSION[4][4], CONFUSION[4][2] = 9, 1


class Page(HTMLParser):
    """The text of the page and its tables as rows of cells; every attribute; every tag must be closed in turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text, self.rows, self.attributes, self.tags = "", [[""]], [], []
        self._open: list[str] = []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, Optional[str]]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in ("meta", "link", "br"):
            self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, Optional[str]]]) -> None:
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.text += data
        if {"td", "th"} & set(self._open):
            self.rows[-1][-1] += data


def train(step: int, **more: Any) -> dict[str, Any]:
    measured = {"loss": 1 / step, "accuracy": 0.5, "learning_rate": 0.2, "images_per_second": 1000.0 * step}
    return {"step": step, "epoch": 0, "split": "train", **measured, **more}


def evaluation(step: int, accuracy: float, **more: Any) -> dict[str, Any]:
    return {"step": step, "epoch": 0, "split": "test", "loss": 0.25, "accuracy": accuracy, "examples": 100, **more}


def run(folder: Path, records: list[dict[str, Any]], config: str = "", summary: Any = None) -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if config:
        (folder / "config.yaml").write_text(config)
    if summary:
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def runs(folder: Path) -> list[Path]:
    """One complete run that two ranks began and four ended, and one that is going on, with a name that is HTML."""
    grown = [train(1, ranks=2), train(2, ranks=2), evaluation(2, 0.9125, ranks=2), train(3, ranks=4)]
    grown.append(evaluation(3, 0.875, ranks=4, confusion=CONFUSION))
    summary = {"train_seconds": 125.0, "images_per_second": 4321.0, "mxnet": "1.9.1"}
    going_on = [train(1, ranks=3), evaluation(1, 0.75, ranks=3)]
    return [
        run(folder / "grown", grown, "run: {dir: a}\noptimizer: {learning_rate: 0.2, name: sgd}\n", summary),
        run(folder / "<b>&amp;", going_on, "run: {dir: b}\noptimizer: {learning_rate: 0.1, name: sgd}\n"),
    ]


@pytest.fixture(scope="module")
def text(runs: list[Path]) -> str:
    return page(read_runs(runs))


@pytest.fixture(scope="module")
def parsed(text: str) -> Page:
    return Page(text)


def report(*arguments: object, folder: Path) -> subprocess.CompletedProcess[str]:
    """The command as a user gives it, in ``folder``."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, str(ROOT / "job" / "report.py"), *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def test_the_command_leaves_the_page_in_the_first_run_and_says_where(runs: list[Path], folder: Path, text: str) -> None:
    done = report("grown", "<b>&amp;", folder=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "report of 2 runs: grown/report.html" and done.stderr == ""
    assert (runs[0] / "report.html").read_text() == text


def test_the_headline_is_the_highest_last_accuracy_and_the_best_evaluation_is_told_apart(parsed: Page) -> None:
    words = " ".join(parsed.text.split())
    assert "0.8750 test accuracy of grown after 3 steps, the highest of 2 runs" in words
    assert "Measured on 100 test images. Best at an evaluation: 0.9125 after 2 steps." in words
    assert "The run is not complete" not in words


def test_the_table_holds_what_each_run_came_to(parsed: Page) -> None:
    held = "complete", "2 → 4", "3", "0.8750", "0.9125after 2 steps", "0.2500", "2 min 05 s", "4,321"
    assert ["grown", *held] in parsed.rows
    assert ["<b>&amp;", "not complete", "3", "1", "0.7500", "0.7500after 1 step", "0.2500", "-", "1,000"] in parsed.rows


def complete(folder: Path, digest: str) -> Path:
    return run(folder, [train(1), evaluation(1, 0.5)], summary={"weights_sha256": digest} if digest else {"steps": 1})


@pytest.mark.parametrize(
    ("digests", "said"),
    [
        (["a", "a"], ["Same weights, to the last bit: run0, run1 (SHA-256 aaaaaaaaaaaa)."]),
        (["a", "b"], ["Other weights: run0 (SHA-256 aaaaaaaaaaaa).", "Other weights: run1 (SHA-256 bbbbbbbbbbbb)."]),
        (
            ["b", "a", "", "a"],
            ["Same weights, to the last bit: run1, run3 (SHA-256 aaaaaaaaaaaa).",
             "Other weights: run0 (SHA-256 bbbbbbbbbbbb)."],
        ),
        (["a"], []),
        (["a", ""], []),
        (["", ""], []),
    ],
    ids=["the same", "other", "both, and one from before", "alone", "nothing to compare", "none known"],
)  # fmt: skip
def test_complete_runs_are_said_to_have_ended_with_the_same_weights_or_others(
    tmp_path: Path, digests: list[str], said: list[str]
) -> None:
    folders = [complete(tmp_path / f"run{place}", digest * 64) for place, digest in enumerate(digests)]
    words = Page(page(read_runs(folders))).text
    assert re.findall(r"(?:Same|Other) weights[^.]*\.", words) == said


def test_a_run_without_a_summary_says_nothing_of_its_weights(parsed: Page) -> None:
    assert "weights" not in parsed.text


def test_only_keys_in_which_runs_differ_are_compared(parsed: Page) -> None:
    assert ["optimizer.learning_rate", "0.2", "0.1"] in parsed.rows
    assert not [row for row in parsed.rows if row[0] in ("run.dir", "optimizer.name")]
    assert "optimizer.name = sgd" in parsed.text and '"mxnet": "1.9.1"' in parsed.text


def test_the_confusion_matrix_has_true_classes_as_rows_and_the_worst_mistakes_in_words(parsed: Page) -> None:
    assert ["Shirt", "3", "0", "0", "0", "0", "0", "7", "0", "0", "0", "70.0%"] in parsed.rows
    assert ["T-shirt/top", "10", *["0"] * 9, "100.0%"] in parsed.rows
    assert "Shirt taken for T-shirt/top, 3 times; Coat taken for Pullover, 1 time." in parsed.text
    assert "The records of <b>&amp; hold no confusion matrix." in parsed.text


def test_the_timeline_has_a_span_for_each_number_of_ranks_as_long_as_its_steps(parsed: Page) -> None:
    assert "grown: 2 ranks to step 2, 4 ranks to step 3" in parsed.text
    steps = [re.search(r"--steps: (\d+)", value or "") for _, name, value in parsed.attributes if name == "style"]
    assert [int(found[1]) for found in steps if found] == [2, 1, 1]


def test_nothing_on_the_page_is_fetched_from_anywhere_or_runs(parsed: Page, text: str) -> None:
    links = [value for _, name, value in parsed.attributes if name in ("src", "href", "xlink:href", "action", "srcset")]
    assert links and all(value and value.startswith(("#", "data:")) for value in links)
    assert "script" not in parsed.tags and not re.search(r"https?:|@import|url\((?!#)", text)


def test_records_from_before_ranks_and_confusion_still_give_a_page_that_says_what_is_missing(tmp_path: Path) -> None:
    old = run(tmp_path / "old", [{"step": 1, "epoch": 0, "split": "train", "loss": 2.0, "accuracy": 0.1}])
    text = page(read_runs([old]))
    for missing in (
        "</strong> of old, and no evaluation yet",
        "Learning rate: no record holds a value.",
        "Images per second: no record holds a value.",
        "The records of old hold no number of ranks.",
        "The records of old hold no confusion matrix.",
        "old: no config.yaml in the folder.",
    ):
        assert missing in text
    assert text.count("<svg") == 2


def test_classes_of_data_that_is_not_known_are_numbers(tmp_path: Path) -> None:
    records = [evaluation(1, 0.5, confusion=CONFUSION)]
    unknown = run(tmp_path / "digits", records, "data: {sha256: {test_labels: any}}\n")
    assert "6 taken for 0, 3 times" in Page(page(read_runs([unknown]))).text


def test_a_run_that_goes_on_is_reported_with_a_note_about_half_a_line(tmp_path: Path) -> None:
    going_on = run(tmp_path / "run", [train(1)])
    with open(going_on / "metrics.jsonl", "a") as stream:
        stream.write('{"step": 2, "epo')
    done = report("run", "--output", "page.html", folder=tmp_path)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "report of 1 run: page.html"
    assert done.stderr.startswith("note: ") and "line 2 is only half written" in done.stderr
    words = Page((tmp_path / "page.html").read_text()).text
    assert "line 2 is only half written" in words and "The run is not complete" in words


@pytest.mark.parametrize(
    "arguments, code, words",
    [
        (["nowhere"], 2, "nowhere: no such folder"),
        ([], 2, "RUN"),
        (["grown", "--output", "."], 2, ". is a folder"),
        (["grown", "--output", "nowhere/page.html"], 1, "nowhere/page.html: cannot be written: No such file"),
    ],
)
def test_what_cannot_be_done_is_one_error_without_a_traceback(
    runs: list[Path], folder: Path, arguments: list[str], code: int, words: str
) -> None:
    done = report(*arguments, folder=folder)
    assert done.returncode == code and words in done.stderr and "Traceback" not in done.stderr and done.stdout == ""
    assert done.stderr.count("error:") == 1 and not list(folder.rglob("*.partial"))


def test_each_change_of_the_ranks_is_a_row_with_its_reason_and_its_cost(tmp_path: Path) -> None:
    folder = run(tmp_path / "elastic", [train(10, ranks=3), train(20, ranks=2)])
    change = {
        "step": 8,
        "ranks_before": 3,
        "ranks": 2,
        "why": "rank 1 <died>",
        "replayed_steps": 4,
        "lost_seconds": 2.5,
    }
    (folder / "changes.jsonl").write_text(json.dumps(change) + "\n" + '{"step": 9}\nhalf a li')
    (history,) = read_runs([folder])
    shown = Page(page([history]))
    assert ["8", "3 → 2", "rank 1 <died>", "4", "2.5"] in shown.rows
    assert [note.partition(": ")[2] for note in history.notes] == [
        "line 2 is no change of ranks and was left out",
        "line 3 is no change of ranks and was left out",
    ]
