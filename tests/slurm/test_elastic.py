"""``sbatch launch/slurm.sbatch --min-np N``: ranks and nodes die, and the job goes on to the same bits."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests import synthetic
from tests.parallel.runs import weights_of_one_rank
from tests.slurm.conftest import HOST, SECOND, Job, Slurm
from tests.slurm.test_slurm import ranks_of, train_steps

TWO_NODES = ["--nodes=2", "--ntasks-per-node=1", "--no-kill"]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def data(tmp_path: Path) -> list[str]:
    options = ["train.log_every_steps=1", "run.step_timeout_seconds=60", "optimizer.learning_rate=0.05"]
    elastic = ["checkpoint.every_steps=null", "elastic.commit_every_steps=2", "elastic.cooldown_seconds=1"]
    return [*synthetic.write(tmp_path / "data"), *options, *elastic]


@pytest.fixture(autouse=True)
def both_nodes_are_up(slurm: Slurm) -> Iterator[None]:
    yield
    for node in (HOST, SECOND):
        if slurm.dead(node):
            slurm.bring_back(node)


def changes(job: Job) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (job.run_dir / "changes.jsonl").read_text().splitlines()]


def rank(job: Job, number: int) -> psutil.Process:
    (process,) = [process for process in ranks_of(job) if process.environ()["HOROVOD_RANK"] == str(number)]
    return process


def assert_as_if_nothing_had_happened(job: Job, steps: int) -> None:
    assert train_steps(job) == [*range(1, steps + 1)]
    summary = json.loads((job.run_dir / "summary.json").read_text())
    assert summary["weights_sha256"] == weights_of_one_rank(job.run_dir)


def assert_nothing_left(job: Job) -> None:
    assert ranks_of(job) == []
    agents = [p for p in psutil.process_iter(["cmdline"]) if "agent.py" in " ".join(p.info["cmdline"] or [])]
    ours = job.slurm.environment["SLURM_CONF"]
    assert [p for p in agents if p.environ().get("SLURM_CONF") == ours] == []


def test_a_rank_and_then_a_node_die_and_the_other_goes_on_to_the_same_bits(slurm: Slurm, data: list[str]) -> None:
    passed = {"LANG": "C.UTF-8", "NCCL_DEBUG": "WARN", "JOB_TERMINAL": "no"}
    arguments = ["-x", "WANTED", "--min-np", "1", *data, "train.epochs=25"]
    job = slurm.submit(TWO_NODES, arguments, A_TOKEN="secret", WANTED="yes", **passed)
    job.wait_for_line("step 5/")
    environments = [process.environ() for process in ranks_of(job)]
    rank(job, 1).kill()
    job.wait_for_line("2 ranks went on after step")
    slurm.kill(SECOND)
    job.wait_for_line("1 rank went on after step")
    slurm.command("scontrol", "update", f"NodeName={SECOND}", "State=DOWN", "Reason=power")
    job.wait("Slurm's knowledge of the lost node", lambda: job.facts()["NodeList"] == HOST)
    facts = job.wait_for_end()
    assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("COMPLETED", "0:0", "0"), job.log
    killed, lost = changes(job)
    assert killed["why"] == f"rank 1 on {SECOND} was ended by SIGKILL"
    assert (killed["ranks_before"], killed["hosts"]) == (2, {HOST: 1, SECOND: 1})
    assert lost["why"] == f"{SECOND} was lost: it does not answer"
    assert (lost["ranks_before"], lost["hosts"]) == (2, {HOST: 1})
    assert all(change["replayed_steps"] <= 3 for change in (killed, lost)), "a commit every two steps"
    for environment in environments:
        assert {**passed, "WANTED": "yes"}.items() <= environment.items()
        assert "secret" not in environment.values()
    assert_nothing_left(job)
    assert_as_if_nothing_had_happened(job, 150)


def test_a_signal_before_the_time_limit_is_a_checkpoint_and_the_job_comes_back(slurm: Slurm, data: list[str]) -> None:
    job = slurm.submit(TWO_NODES, ["--min-np", "1", *data, "train.epochs=10"])
    job.wait_for_line("step 8/")
    slurm.command("scancel", "--signal=USR1", "--batch", job.number)  # as --signal=B:USR1@120 does at the limit
    facts = job.wait_for_end()
    assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("COMPLETED", "0:0", "1"), job.log
    assert "is queued again, and will go on" in job.log
    assert 8 <= int(job.log.rpartition("going on after step ")[2].partition("\n")[0]) < 60
    assert_nothing_left(job)
    assert_as_if_nothing_had_happened(job, 60)


def test_too_few_nodes_for_too_long_bring_the_last_commit_to_the_disk_and_the_job_back(
    slurm: Slurm, data: list[str]
) -> None:
    job = slurm.submit(TWO_NODES, ["--min-np", "2", *data, "train.epochs=10", "elastic.timeout_seconds=2"])
    job.wait_for_line("step 8/")
    slurm.kill(SECOND)
    job.wait_for_line("is queued again, and will go on")
    assert "fewer than 2 ranks for 2 s: giving up" in job.log
    slurm.bring_back(SECOND)
    facts = job.wait_for_end()
    assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("COMPLETED", "0:0", "1"), job.log
    assert int(job.log.rpartition("going on after step ")[2].partition("\n")[0]) >= 6, "a commit every two steps"
    assert_as_if_nothing_had_happened(job, 60)


def test_a_job_that_lost_its_first_node_comes_back_and_goes_on_from_the_commit_of_the_other(
    slurm: Slurm, data: list[str]
) -> None:
    job = slurm.submit(TWO_NODES, ["--min-np", "1", *data, "train.epochs=30"])
    job.wait_for_line("step 9/")  # with a checkpoint of the epoch's end, after step 6
    slurm.kill(HOST)  # with rank 0, the batch script, and what reaches the other node
    job.wait("the commit on the disk", lambda: int(max((job.run_dir / "checkpoints").iterdir()).name[-8:]) >= 8)
    job.wait("the job's return to the queue", lambda: job.facts()["Restarts"] == "1")
    assert not ranks_of(job)
    slurm.bring_back(HOST)
    facts = job.wait_for_end()
    assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("COMPLETED", "0:0", "1"), job.log
    assert_nothing_left(job)
    assert_as_if_nothing_had_happened(job, 180)


def test_a_cancelled_job_writes_a_checkpoint_and_leaves_nothing_running(slurm: Slurm, data: list[str]) -> None:
    job = slurm.submit(TWO_NODES, ["--min-np", "1", *data, "train.epochs=100000"])
    job.wait_for_line("step 3/")
    slurm.command("scancel", job.number)
    facts = job.wait_for_end()
    job.wait_for_line("not queued again")
    assert (facts["JobState"], facts["Restarts"]) == ("CANCELLED", "0"), job.log
    checkpoint = max((job.run_dir / "checkpoints").iterdir())
    assert int(checkpoint.name[-8:]) >= train_steps(job)[-1]
    assert_nothing_left(job)


def test_more_ranks_to_go_on_with_than_tasks_are_refused(slurm: Slurm, data: list[str]) -> None:
    job = slurm.submit(TWO_NODES, ["--min-np", "3", *data])
    facts = job.wait_for_end()
    assert (facts["JobState"], facts["ExitCode"]) == ("FAILED", "2:0"), job.log
    assert "--min-np 3 is more than there may be ranks, 2" in job.log
