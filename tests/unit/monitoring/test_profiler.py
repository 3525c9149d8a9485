"""Where the time goes: each instant is counted once, as what the module says, and the traces are what viewers read."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from job.config import ROOT, load_config
from job.distributed.comm import Comm
from job.monitoring.profiler import PARTS, Profiler, Span, collectives, read_spans, split_time, write_spans
from tests import synthetic

NAMES = {
    "operator": ("operator", "Convolution"),
    "collective": ("operator", "horovod_allreduce"),
    "custom": ("Custom Operator", "sync_batch_norm::pure_python"),
    "collective in custom": ("Custom Operator", "sync_batch_norm::horovod_allreduce"),
    "operator in custom": ("Custom Operator", "sync_batch_norm::_mul_scalar"),
    "input": ("job", "input"),
    "step": ("job", "step 7"),
}


def span(what: str, start: int, end: int) -> Span:
    return Span(*NAMES[what], thread=1, start=start, end=end)


# id: (spans, the shortest time in each collective, compute, wait, allreduce, input, rest) of a window from 0 to 100
SPLITS: dict[str, tuple[list[Span], list[int], list[int]]] = {
    "nothing goes on": ([], [], [0, 0, 0, 0, 100]),
    "two operators side by side count once": (
        [span("operator", 10, 40), span("operator", 20, 50)], [], [40, 0, 0, 0, 60],
    ),
    "what begins before the window and ends after it is cut": ([span("operator", -50, 900)], [], [100, 0, 0, 0, 0]),
    "a collective is waiting first and allreduce then": ([span("collective", 10, 60)], [20], [0, 30, 20, 0, 50]),
    "the last rank to come does not wait": ([span("collective", 10, 60)], [50], [0, 0, 50, 0, 50]),
    "a collective that waits beside one that is on its way costs nothing": (
        [span("collective", 10, 60), span("collective", 20, 70)], [50, 10], [0, 0, 60, 0, 40],
    ),
    "what an operator hides costs nothing": (
        [span("collective", 10, 60), span("input", 0, 30), span("operator", 5, 55)], [20], [50, 0, 5, 5, 40],
    ),
    "a batch that is made while others are waited for costs nothing": (
        [span("collective", 10, 60), span("input", 0, 30)], [20], [0, 30, 20, 10, 40],
    ),
    "a custom operator computes but for its collective": (
        [span("custom", 10, 60), span("collective in custom", 20, 50)], [10], [20, 20, 10, 0, 50],
    ),
    "an operator computes while a custom operator is in its collective": (
        [span("custom", 10, 60), span("collective in custom", 20, 50), span("operator", 30, 40)],
        [10],
        [30, 10, 10, 0, 50],
    ),
    "operators of a custom operator are part of it": (
        [span("custom", 10, 60), span("operator in custom", 20, 50)], [], [50, 0, 0, 0, 50],
    ),
    "a step as such is nothing": ([span("step", 0, 100)], [], [0, 0, 0, 0, 100]),
}  # fmt: skip


@pytest.mark.parametrize(("spans", "shortest", "expected"), list(SPLITS.values()), ids=list(SPLITS))
def test_time_is_split_as_the_module_says(spans: list[Span], shortest: list[int], expected: list[int]) -> None:
    assert split_time(spans, (0, 100), shortest) == dict(zip(PARTS, expected))


def instant_by_instant(spans: list[Span], window: tuple[int, int], shortest: list[int]) -> dict[str, int]:
    """The oracle: the definition, asked of each microsecond."""
    parts = dict.fromkeys(PARTS, 0)
    began = {id(span): span.end - length for span, length in zip(collectives(spans), shortest)}
    for t in range(*window):
        now = [span for span in spans if span.start <= t < span.end]
        kinds = [next(what for what, name in NAMES.items() if name == (span.category, span.name)) for span in now]
        under_way = [began[id(span)] <= t for span in now if id(span) in began]
        computes = "custom" in kinds and "collective in custom" not in kinds
        if computes or "operator" in kinds or "operator in custom" in kinds:
            parts["compute"] += 1
        elif any(under_way):
            parts["allreduce"] += 1
        elif under_way:
            parts["wait"] += 1
        else:
            parts["input" if "input" in kinds else "rest"] += 1
    return parts


@given(
    st.lists(st.tuples(st.sampled_from(list(NAMES)), st.integers(-9, 60), st.integers(1, 40)), max_size=9), st.data()
)
def test_every_instant_is_counted_once_whatever_overlaps(rows: list[tuple[str, int, int]], data: Any) -> None:
    spans = [span(what, start, start + length) for what, start, length in rows]
    shortest = [data.draw(st.integers(0, span.end - span.start)) for span in collectives(spans)]
    parts = split_time(spans, (0, 50), shortest)
    assert parts == instant_by_instant(spans, (0, 50), shortest)
    assert sum(parts.values()) == 50


def test_a_trace_holds_small_numbers_and_spans_that_nest_within_their_track(tmp_path: Path) -> None:
    hashed = 13744310708510870859
    spans = [
        Span("job", "input", hashed + 1, 1_795_458_280_000_010, 1_795_458_280_000_020),
        Span("job", "step 1", hashed + 1, 1_795_458_280_000_010, 1_795_458_280_000_090),
        Span("Custom Operator", "bn::pure_python", hashed, 1_795_458_280_000_030, 1_795_458_280_000_070),
        Span("Custom Operator", "bn::horovod_allreduce", hashed, 1_795_458_280_000_060, 1_795_458_280_000_080),
    ]
    write_spans(tmp_path / "trace.json", spans, rank=3)
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {event["pid"] for event in events} == {3} and max(event["tid"] for event in events) < 10
    names = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    slices = [(names[e["tid"]], e["name"], e["ts"] % 100, e["dur"]) for e in events if e["ph"] == "X"]
    assert slices == [
        ("Python", "step 1", 10, 80),
        ("Python", "input", 10, 10),
        ("custom operators", "bn::pure_python", 30, 40),
        ("collectives", "bn::horovod_allreduce", 60, 20),
    ]


@pytest.mark.parametrize("text", ["", "{}", '{"traceEvents": [{"ph": "b", "name": "x"}]}'])
def test_a_file_that_is_no_trace_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "trace.json").write_text(text)
    with pytest.raises((ValueError, KeyError)):
        read_spans(tmp_path / "trace.json")


def profiler(folder: Path, steps: str = "3-4") -> Profiler:
    config = load_config(overrides=[f"run.dir={folder}", f"run.profile_steps={steps}"])
    return Profiler(config, Comm(), learner=None)  # type: ignore[arg-type]  (which no step that is not profiled touches)


def run_steps(profiler: Profiler, *steps: int) -> int:
    """How many of these steps have run, in a run that ends then."""
    ran = 0
    with profiler:
        for step in steps:
            with profiler.step(step):
                ran += 1
    return ran


@pytest.mark.parametrize("steps", [(1, 2), (5, 6), ()], ids=["before", "after", "none"])
def test_steps_that_were_not_reached_are_told_at_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], steps: tuple[int, ...]
) -> None:
    assert run_steps(profiler(tmp_path), *steps) == len(steps)
    assert "run.profile_steps=3-4 was not reached" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_without_steps_to_profile_nothing_is_said_or_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_steps(profiler(tmp_path, steps="null"), 1, 2, 3) == 3
    assert capsys.readouterr().out == "" and not list(tmp_path.iterdir())


def test_a_profile_that_is_there_is_kept_and_training_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    earlier = tmp_path / "profile" / "steps-3-4.rank0.json"
    earlier.parent.mkdir()
    earlier.write_text("the work of an earlier run")
    assert run_steps(profiler(tmp_path), 2, 3, 4, 5) == 4
    assert "steps 3-4 are not profiled" in (said := capsys.readouterr().out) and "is there already" in said
    assert len(said.splitlines()) == 1
    assert earlier.read_text() == "the work of an earlier run"


def test_a_folder_that_cannot_be_made_is_told_and_training_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "profile").write_text("a file")
    assert run_steps(profiler(tmp_path), 2, 3, 4, 5) == 4
    assert "not profiled" in (said := capsys.readouterr().out) and "cannot be made" in said


def test_an_error_in_the_run_is_not_covered_by_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError), profiler(tmp_path) as failing, failing.step(1):
        raise ZeroDivisionError
    assert capsys.readouterr().out == ""


SLOW_FEED = """
import time
from job.distributed.placement import share_cores
from job.quick_import import quicken
share_cores()  # before MXNet is imported
quicken()
from job import command, train
from job.training import learner
import mxnet

def slowly(self, *arguments, original=learner.Feed.__call__):
    mxnet.nd.waitall()  # so that no operator hides it
    time.sleep(0.125)
    return original(self, *arguments)

learner.Feed.__call__ = slowly
command.run(train.main)
"""


def run(script: list[str], folder: Path, *overrides: str) -> tuple[str, str]:
    """What a run on one rank prints, and the checksum of its last weights."""
    data = synthetic.write(folder.parent / "data")
    arguments = [*data, f"run.dir={folder}", "train.epochs=1", "train.accumulate_steps=2", "data.shards=2", *overrides]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *script, *arguments], capture_output=True, text=True, timeout=120, env=environment
    )
    assert done.returncode == 0, done.stderr
    weights = (folder / "checkpoints" / "step-00000006" / "arrays.params").read_bytes()
    return done.stdout, hashlib.sha256(weights).hexdigest()


@pytest.fixture(scope="module")
def slow_feed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A run of 6 steps in two micro-batches, each of which takes an eighth of a second to bring in.

    Steps 3 to 5 are profiled.
    """
    folder = tmp_path_factory.mktemp("profiled") / "run"
    return folder, *run(["-c", SLOW_FEED], folder, "run.profile_steps=3-5")


def table(printed: str) -> dict[str, tuple[float, float]]:
    """Milliseconds a step and per cent, by part."""
    rows = re.findall(r"profile: (\w+) +([0-9.]+) +([0-9.]+)%", printed)
    return {part: (float(milliseconds), float(share)) for part, milliseconds, share in rows}


def test_an_input_that_is_slow_shows_as_input(slow_feed: tuple[Path, str, str]) -> None:
    rows = table(slow_feed[1])
    assert rows["input"][0] >= 250  # milliseconds a step, of two micro-batches
    assert rows["compute"][0] > 0 and rows["wait"][0] == rows["allreduce"][0] == 0


def test_the_parts_of_a_real_run_add_up_to_the_whole(slow_feed: tuple[Path, str, str]) -> None:
    rows = table(slow_feed[1])
    assert list(rows) == [*PARTS, "whole"]
    assert sum(rows[part][0] for part in PARTS) == pytest.approx(rows["whole"][0], abs=0.03)
    assert sum(rows[part][1] for part in PARTS) == pytest.approx(100, abs=0.3)


def test_the_trace_holds_the_steps_and_their_batches_and_lies_within_the_whole(
    slow_feed: tuple[Path, str, str],
) -> None:
    assert [file.name for file in (slow_feed[0] / "profile").iterdir()] == ["steps-3-5.rank0.json"]
    events = json.loads((slow_feed[0] / "profile" / "steps-3-5.rank0.json").read_text())["traceEvents"]
    slices = [event for event in events if event["ph"] == "X"]
    named = [event["name"] for event in slices]
    assert [name for name in named if name.startswith("step ")] == ["step 3", "step 4", "step 5"]
    assert named.count("input") == 3 * 2  # steps, micro-batches
    # 2 layers, 3 steps, 2 micro-batches: both shards in one
    assert named.count("sync_batch_norm::pure_python") == named.count("_backward_sync_batch_norm::pure_python") == 12
    extent = max(e["ts"] + e["dur"] for e in slices) - min(e["ts"] for e in slices)
    assert extent / 3 / 1000 <= table(slow_feed[1])["whole"][0] + 0.01
    assert sum(e["dur"] for e in slices if e["name"] == "input") >= 6 * 0.125e6


def test_ten_lines_say_where_time_went_and_where_the_files_are(slow_feed: tuple[Path, str, str]) -> None:
    lines = [line for line in slow_feed[1].splitlines() if line.startswith("profile: ")]
    assert len(lines) == 10 and max(map(len, lines)) < 160
    assert lines[0] == "profile: steps 3-5 on 1 rank, in ms a step"
    assert str(slow_feed[0] / "profile" / "steps-3-5.rank0.json") in lines[7]
    assert "one rank" in lines[8] and "chrome://tracing" in lines[9]


def test_weights_are_the_same_bits_with_and_without_a_profile(slow_feed: tuple[Path, str, str], tmp_path: Path) -> None:
    printed, weights = run([str(ROOT / "job" / "train.py")], tmp_path / "run")
    assert weights == slow_feed[2]
    assert "profile" not in printed


def test_the_mean_and_the_rank_with_most_are_those_of_the_table() -> None:
    from job.monitoring.profiler import _summary

    seconds = np.array([[0.2, 0.0, 0.1, 0.0, 0.1], [0.1, 0.2, 0.1, 0.0, 0.1]])
    lines = _summary([7, 8], seconds)
    assert lines[0] == "steps 7-8 on 2 ranks, in ms a step: mean, share, and the rank with most"
    assert lines[1].split() == ["compute", "75.00", "33.3%", "100.00", "(rank", "0)"]
    assert lines[2].split() == ["wait", "50.00", "22.2%", "100.00", "(rank", "1)"]
    assert lines[6].split() == ["whole", "225.00", "100.0%", "250.00", "(rank", "1)"]
