"""The user's command with --min-np: a rank is killed from outside, and the weights are those of one rank on its own."""

from __future__ import annotations

import json
import subprocess
from contextlib import suppress
from pathlib import Path

import psutil

from tests import synthetic
from tests.parallel.conftest import ROOT
from tests.parallel.runs import weights_of_one_rank


def test_a_job_whose_rank_is_killed_goes_on_and_ends_as_one_rank_alone(tmp_path: Path) -> None:
    settings = [*synthetic.write(tmp_path / "data"), "train.epochs=4", "train.log_every_steps=1"]
    command = ["launch/local.sh", "-np", "2", "--min-np", "1", *settings, f"run.dir={tmp_path}/run"]
    job = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert job.stdout and job.stderr
        for line in job.stdout:
            if line.startswith("step 8/"):
                oldest_of_rank(job.pid, "1").kill()
                break
        output, errors = job.communicate(timeout=200)
    finally:
        job.kill()
    assert job.returncode == 0, errors
    assert "done: " in output
    assert "launch/local.sh: rank 1 was ended by SIGKILL; going on with 2 ranks" in errors
    (change,) = [json.loads(line) for line in (tmp_path / "run" / "changes.jsonl").read_text().splitlines()]
    assert change["ranks_before"] == change["ranks"] == 2
    assert change["replayed_steps"] <= 10
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["weights_sha256"] == weights_of_one_rank(tmp_path / "run")
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sorted(steps) == steps and {*steps} == {*range(1, 25)}


def oldest_of_rank(job: int, rank: str) -> psutil.Process:
    """The process that trains; one that waits to replace it is younger."""
    ranks = []
    for child in psutil.Process(job).children(recursive=True):
        with suppress(psutil.Error):  # it may end meanwhile
            if child.environ().get("HOROVOD_RANK") == rank:
                ranks.append(child)
    return min(ranks, key=lambda child: child.create_time())
