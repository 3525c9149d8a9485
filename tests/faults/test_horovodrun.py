"""``horovodrun --min-np``: Horovod's own elastic driver, with ranks and workers that die and slots that come and go."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.faults.conftest import Run, finish, wait_for_line
from tests.parallel.conftest import HOROVODRUN, ROOT
from tests.parallel.runs import weights_of_one_rank

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.fault(13)]
PATIENCE = 240.0


class Job:
    """A run under ``horovodrun``, which asks a script for its hosts."""

    def __init__(self, run: Run, folder: Path) -> None:
        self.run, self.run_dir = run, run.folder
        self._listed, self._script = folder / "listed", folder / "discover"
        self._script.write_text(f"#!/bin/sh\ncat {self._listed}\n")
        self._script.chmod(0o755)

    def lists(self, slots: int) -> None:
        """What the script prints from now on."""
        self._listed.with_suffix(".new").write_text(f"localhost:{slots}\n")
        self._listed.with_suffix(".new").rename(self._listed)

    def start(self, slots: int, *overrides: str) -> subprocess.Popen[str]:
        self.lists(slots)
        sizes = ["-np", str(slots), "--min-np", "1", "--max-np", "4", "--network-interface", "lo"]
        command = [str(HOROVODRUN), *sizes, "--host-discovery-script", str(self._script)]
        recipe = ["checkpoint.every_steps=null", "elastic.commit_every_steps=2", *overrides]
        return self.run.popen([*command, "python", str(ROOT / "job" / "train.py"), *self.run.arguments, *recipe])

    def process(self, rank: int, script: str = "train.py") -> psutil.Process:
        (found,) = [
            process
            for process in self.run.processes()
            if os.path.basename(process.cmdline()[1]) == script and process.environ().get("HOROVOD_RANK") == str(rank)
        ]
        return found

    def changes(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.run_dir / "changes.jsonl").read_text().splitlines()]


@pytest.fixture
def job(run: Run, tmp_path: Path) -> Job:
    return Job(run, tmp_path)


def test_slots_come_and_go_and_a_rank_dies_and_the_bits_are_those_of_one_rank(job: Job) -> None:
    process = job.start(2, "train.epochs=50")
    wait_for_line(process, "step 5/")
    job.lists(3)
    wait_for_line(process, "3 ranks went on after step")
    job.process(1).kill()
    wait_for_line(process, "3 ranks went on after step")
    job.lists(1)
    wait_for_line(process, "1 rank went on after step")
    ended = finish(process, PATIENCE)
    assert ended.code == 0, ended.output
    job.run.assert_nothing_left()
    joined, killed, left = job.changes()
    assert [(change["ranks_before"], change["ranks"]) for change in (joined, killed, left)] == [(2, 3), (3, 3), (3, 1)]
    assert joined["why"] == left["why"] == "hosts joined or left"
    assert (joined["replayed_steps"], left["replayed_steps"]) == (0, 0)
    assert killed["why"] == "a rank failed" and killed["replayed_steps"] <= 3, "a commit every two steps"
    assert [record["step"] for record in job.run.records() if record["split"] == "train"] == [*range(1, 301)]
    summary = json.loads((job.run_dir / "summary.json").read_text())
    assert summary["weights_sha256"] == weights_of_one_rank(job.run_dir)


def test_a_worker_that_dies_ends_the_job_with_its_last_commit_on_the_disk(job: Job) -> None:
    """Horovod leaves out its host, and there is no other one."""
    process = job.start(2, "train.epochs=1000")
    output = wait_for_line(process, "step 9/")
    assert "step 6/" in output
    job.process(1, "horovodrun.py").kill()
    ended = finish(process, PATIENCE)
    assert ended.code == 1, ended.output
    job.run.assert_nothing_left()
    committed = int(job.run.checkpoints()[-1][-8:])
    assert committed >= 8, "a commit every two steps"
    again = finish(job.start(1, f"train.max_steps={committed + 6}"), PATIENCE)
    assert again.code == 0, again.output
    assert f"going on after step {committed}\n" in again.output
    summary = json.loads((job.run_dir / "summary.json").read_text())
    assert summary["weights_sha256"] == weights_of_one_rank(job.run_dir)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_launcher_that_is_stopped_or_killed_leaves_a_checkpoint_and_nothing_running(
    job: Job, number: signal.Signals
) -> None:
    process = job.start(2, "train.epochs=1000")
    wait_for_line(process, "step 9/")
    process.send_signal(number)
    ended = finish(process, PATIENCE)
    assert ended.code != 0
    job.run.assert_nothing_left()
    assert int(job.run.checkpoints()[-1][-8:]) >= 8, "at least the last commit, of which there is one every two steps"


def test_a_mistake_is_told_once_and_starts_nothing(job: Job) -> None:
    ended = finish(job.start(2, "train.epochs=none"), PATIENCE)
    assert ended.code == 1, "Horovod makes 1 of all codes"
    assert ended.output.count("error: bad configuration") == 1 and "train.epochs" in ended.output, ended.output
    assert not job.run_dir.exists()
