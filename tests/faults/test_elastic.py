"""Ranks that die while the others are to go on, by seeds: row 13 of the matrix.

``ELASTIC_SEED=7 KILLS=1`` repeats the run of seed 7; what a seed chose is printed.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.faults.conftest import Ended, Run, finish, wait_for_line

MEMORY = Path("/dev/shm")
PATIENCE = 240.0  # seconds for up to seven starts
POINTS = ("step", "allreduce", "commit", "evaluation", "save", "start", "resume")
OF_RANK_0 = ("commit",)  # nobody else does it


def faults_of(seed: int) -> str:
    """One to three deaths, in the order of the steps at which they are due, each of one or two ranks."""
    chance = random.Random(seed)
    faults = []
    for number, step in enumerate(sorted(chance.sample(range(1, 18), chance.randint(1, 3)))):
        point = chance.choice(POINTS if number else POINTS[:-2])  # a start and a recovery only after another death
        ranks = "+".join(map(str, chance.sample(range(3), chance.choice([1, 1, 2]))))
        after = {"start": 0, "resume": 0}.get(point, step)
        faults.append(f"kill:{point}:{'0' if point in OF_RANK_0 else ranks}:{after}")
    return " ".join(faults)


def train(run: Run, faults: str, *overrides: str, ranks: int = 3) -> Ended:
    marks = run.folder.with_name("marks")
    marks.mkdir()
    return finish(run.popen(supervised(run, *overrides, ranks=ranks), faults, FAULT_MARKS=str(marks)), PATIENCE)


def supervised(run: Run, *overrides: str, ranks: int = 3) -> list[str]:
    recipe = ["elastic.commit_every_steps=2", "elastic.cooldown_seconds=0.5", "run.resume=auto", *overrides]
    command = [sys.executable, "-m", "tests.faults.supervised", "-np", str(ranks), "--min-np", "1"]
    return [*command, *run.arguments, *recipe]


def changes(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.folder / "changes.jsonl").read_text().splitlines()]


def assert_as_if_nothing_had_happened(run: Run, whole: Run, ended: Ended) -> None:
    assert ended.code == 0, ended.output
    run.assert_nothing_left()
    assert run.weights() == whole.weights()
    assert run.records() == whole.records()
    assert not memory_of(ended)


def memory_of(ended: Ended) -> list[Path]:
    """Folders for commits that their supervisor has left."""
    return [folder for folder in MEMORY.glob("horovod-gluon-job.*") if not (folder / "lock").exists()]


@pytest.mark.fault(13)
@pytest.mark.parametrize(
    ("faults", "changed"),
    [
        ("kill:step:1:7 kill:resume:0:0 kill:commit:0:12", 2),
        ("kill:allreduce:0+2:9 kill:evaluation:2:12 kill:save:2:14", 3),
    ],
)
def test_ranks_die_and_the_end_is_that_of_the_run_to_which_nothing_happened(
    run: Run, whole: Run, faults: str, changed: int
) -> None:
    ended = train(run, faults)
    assert_as_if_nothing_had_happened(run, whole, ended)
    noted = changes(run)
    assert len(noted) >= changed
    for change in noted:
        assert change["replayed_steps"] <= 5
        assert change["why"].startswith(("rank ", "a place"))
    assert any("SIGKILL" in change["why"] for change in noted)


@pytest.mark.fault(13)
def test_every_rank_and_the_supervisor_die_and_a_plain_resume_goes_on_from_the_disk(run: Run, whole: Run) -> None:
    process = run.popen(supervised(run, "train.epochs=1000", ranks=2))
    wait_for_line(process, "step 9/")
    os.killpg(process.pid, signal.SIGKILL)
    for rank in run.processes():
        rank.kill()
    finish(process)
    run.assert_nothing_left()
    again = run.train(2, "run.resume=auto")
    assert again.code == 0, again.output
    assert re.search(r"going on after step (6|10)\n", again.output), "those on the disk"
    assert run.weights() == whole.weights()
    assert run.records() == whole.records()


@pytest.mark.fault(13)
def test_ranks_that_lose_their_supervisor_stop_with_a_checkpoint(run: Run, whole: Run) -> None:
    process = run.popen(supervised(run, "train.epochs=1000", ranks=2))
    wait_for_line(process, "step 9/")
    process.kill()
    output, _ = process.communicate(timeout=90)
    assert "preempted: rank 0: stopped after step" in output
    run.assert_nothing_left()
    again = run.train(3, "run.resume=auto")
    assert again.code == 0, again.output
    assert run.weights() == whole.weights()
    assert run.records() == whole.records()


@pytest.mark.fault(13)
def test_a_run_that_fails_at_the_same_step_for_ever_ends_with_its_reason(run: Run) -> None:
    ended = finish(run.popen(supervised(run, ranks=2), "nan:step:all:9"), PATIENCE)
    assert ended.code == 1
    assert len(re.findall(r"error: (rank 0: )?step 10: ", ended.output)) == 4, "the reason, each time"
    assert "3 failures without a step more: giving up" in ended.output
    run.assert_nothing_left()
    assert run.checkpoints()[-1] == "step-00000008", "the last commit is brought to the disk"


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.fault(13)
def test_whatever_dies_whenever_the_end_is_that_of_the_run_to_which_nothing_happened(
    whole: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = int(os.environ.get("ELASTIC_SEED", "0"))
    for seed in range(first, first + int(os.environ.get("KILLS", "50"))):
        run = Run(tmp_path / str(seed))
        faults = faults_of(seed)
        ended = train(run, faults)
        lost = [change["lost_seconds"] for change in changes(run)] if ended.code == 0 else []
        with capsys.disabled():
            print(f"seed {seed}: {faults}; exit {ended.code}; seconds lost: {lost}", flush=True)
        assert_as_if_nothing_had_happened(run, whole, ended)
