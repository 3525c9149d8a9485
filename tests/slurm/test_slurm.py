"""``sbatch launch/slurm.sbatch`` under a real Slurm with two nodes on this machine."""

from __future__ import annotations

import json
from pathlib import Path

import psutil
import pytest

from tests import synthetic
from tests.parallel.runs import weights_of_one_rank
from tests.slurm.conftest import Job, Slurm

TWO_NODES = ["--nodes=2", "--ntasks-per-node=1"]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def data(tmp_path: Path) -> list[str]:
    options = ["train.log_every_steps=1", "run.step_timeout_seconds=60", "optimizer.learning_rate=0.05"]
    return [*synthetic.write(tmp_path / "data"), *options]


def train_steps(job: Job) -> list[int]:
    lines = (job.run_dir / "metrics.jsonl").read_text().splitlines()
    return [record["step"] for record in map(json.loads, lines) if record["split"] == "train"]


def ranks_of(job: Job) -> list[psutil.Process]:
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if f"run.dir=runs/slurm-{job.number}" in (process.info["cmdline"] or [])
        and process.info["cmdline"][1].endswith("job/train.py")
    ]


def test_two_tasks_on_one_node_train_and_no_secret_reaches_them(slurm: Slurm, data: list[str]) -> None:
    passed = {"LANG": "C.UTF-8", "NCCL_DEBUG": "WARN", "TZ": "UTC", "https_proxy": "http://proxy"}
    job = slurm.submit([], [*data, "train.epochs=3"], A_TOKEN="secret", **passed)
    job.wait_for_line("step 2/")
    environments = [process.environ() for process in ranks_of(job)]
    facts = job.wait_for_end()
    assert (facts["JobState"], facts["ExitCode"]) == ("COMPLETED", "0:0"), job.log
    summary = json.loads((job.run_dir / "summary.json").read_text())
    assert (summary["ranks"], summary["steps"]) == (2, 18)
    assert train_steps(job) == list(range(1, 19))
    assert sorted(environment["HOROVOD_LOCAL_RANK"] for environment in environments) == ["0", "1"]
    for environment in environments:
        assert passed.items() <= environment.items()
        assert "secret" not in environment.values()


def test_a_job_told_of_its_time_limit_is_requeued_and_ends_with_the_same_bits(slurm: Slurm, data: list[str]) -> None:
    job = slurm.submit(TWO_NODES, [*data, "train.epochs=15", "checkpoint.every_steps=null"])
    job.wait_for_line("step 8/")
    assert {process.environ()["HOROVOD_CROSS_SIZE"] for process in ranks_of(job)} == {"2"}
    slurm.command("scancel", "--signal=USR1", "--batch", job.number)  # as --signal=B:USR1@120 does at the limit
    facts = job.wait_for_end()
    assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("COMPLETED", "0:0", "1"), job.log
    assert "is queued again, and will go on" in job.log
    assert "received SIGUSR1" in job.log
    stopped_at = int(job.log.partition("stopped after step ")[2].partition(",")[0])
    assert f"going on after step {stopped_at}" in job.log
    assert 8 <= stopped_at < 90
    assert train_steps(job) == list(range(1, 91))
    summary = json.loads((job.run_dir / "summary.json").read_text())
    assert summary["ranks"] == 2
    assert summary["weights_sha256"] == weights_of_one_rank(job.run_dir)


def test_the_elements_of_an_array_each_train_and_the_last_one_alone_comes_back(slurm: Slurm, data: list[str]) -> None:
    options = ["--array=0-1", "--ntasks-per-node=1", "--cpus-per-task=2"]
    array = slurm.submit(options, [*data, "train.epochs=15", "checkpoint.every_steps=null"])
    first, last = (Job(slurm, f"{array.number}_{index}") for index in range(2))
    last.wait_for_line("step 8/")
    number = last.facts()["JobId"]
    assert number == array.number  # the number of the whole array
    workers = {process.environ()["MXNET_CPU_WORKER_NTHREADS"] for process in ranks_of(Job(slurm, number))}
    assert workers == {"2"}  # the cores that Slurm gives a task
    slurm.command("scancel", "--signal=USR1", "--batch", last.number)
    facts = last.wait_for_end()
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1"), last.log
    assert f"job {last.number} is queued again" in last.log
    facts = first.wait_for_end()
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "0"), first.log
    folders = [Job(slurm, job.facts()["JobId"]).run_dir for job in (first, last)]
    one, other = (json.loads((folder / "summary.json").read_text())["weights_sha256"] for folder in folders)
    assert one == other


def test_slurms_own_time_limit_stops_with_a_checkpoint_and_a_cancelled_job_stays_cancelled(
    slurm: Slurm, data: list[str]
) -> None:
    job = slurm.submit([*TWO_NODES, "--time=2", "--signal=B:USR1@5"], [*data, "train.epochs=100000"])
    job.wait("Slurm's signal", lambda: "SIGUSR1: asking all ranks to stop" in job.log, seconds=180)
    job.wait_for_line("is queued again, and will go on")
    assert "received SIGUSR1" in job.log
    job.wait_for_line("going on after step")
    before = job.log.count("stopped after step")
    job.wait("a step after it", lambda: "step " in job.log.partition("going on after step")[2].partition("\n")[2])
    slurm.command("scancel", job.number)
    job.wait("the ranks' checkpoint", lambda: job.log.count("stopped after step") > before)
    job.wait_for_line("not queued again")
    facts = job.wait_for_end()
    assert (facts["JobState"], facts["Restarts"]) == ("CANCELLED", "1"), job.log
    assert not ranks_of(job)


def test_a_bad_configuration_ends_with_2_and_one_message_and_is_not_requeued(slurm: Slurm, data: list[str]) -> None:
    job = slurm.submit(TWO_NODES, [*data, "train.epochs=0"])
    facts = job.wait_for_end()
    assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("FAILED", "2:0", "0"), job.log
    assert job.log.count("error: ") == 1 and "train.epochs" in job.log
    assert not job.run_dir.exists()


@pytest.mark.parametrize("victim", ["0", "1"])
def test_a_killed_rank_fails_the_job_which_is_not_requeued(slurm: Slurm, data: list[str], victim: str) -> None:
    job = slurm.submit(TWO_NODES, [*data, "train.epochs=100000"])
    job.wait_for_line("step 3/")
    for process in ranks_of(job):
        if process.environ()["HOROVOD_RANK"] == victim:
            process.kill()
    facts = job.wait_for_end()
    assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("FAILED", "1:0", "0"), job.log
    assert f"rank {victim}: ended by SIGKILL" in job.log
    assert not ranks_of(job)


def test_uneven_tasks_are_placed_as_slurm_placed_them(slurm: Slurm, data: list[str]) -> None:
    job = slurm.submit(["--nodes=2", "--ntasks=3", "--ntasks-per-node=2"], [*data, "train.max_steps=2"])
    facts = job.wait_for_end()
    assert facts["JobState"] == "COMPLETED", job.log
    assert json.loads((job.run_dir / "summary.json").read_text())["ranks"] == 3
