"""The supervisor of launch/local.sh --min-np, with ranks that are small programs and do what a test says."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import psutil
import pytest

from job.config import load_config
from job.errors import JobError
from launch.elastic import memory as memory_module
from launch.elastic.__main__ import main
from tests.unit.launch.scripts import PATIENCE, ROOT

# Reads what ranks do in the attempts of a job: {rank: exit code, or minus a signal}. Whoever is not named waits for
# SIGTERM, and then ends with 75, as a preempted rank does. Rank 0 tells that steps have been taken.
RANK = """
import json, os, signal, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
if "--check" in sys.argv:
    print((folder / "config.yaml").read_text())
    sys.exit(int((folder / "check").read_text()) if (folder / "check").exists() else 0)
if os.environ.pop("JOB_STANDBY", None):
    order = sys.stdin.readline()
    if not order:
        sys.exit(0)
    os.environ.update(json.loads(order))
signal.signal(signal.SIGTERM, lambda *_: os._exit(75))
rank = os.environ["HOROVOD_RANK"]
attempt = folder / os.environ["HOROVOD_GLOO_RENDEZVOUS_PORT"]
while rank != "0" and not attempt.exists():
    time.sleep(0.01)
if rank == "0":
    log = folder / "log"
    with open(log, "a") as stream:
        stream.write(json.dumps({"size": int(os.environ["HOROVOD_SIZE"]), "arguments": sys.argv[2:]}) + "\\n")
    number = len(log.read_text().splitlines()) - 1
    plan = json.loads((folder / "plan").read_text())
    plan = plan[min(number, len(plan) - 1)]
    if plan["steps"] >= 0:
        progress = "%12d %12d" % (plan.get("from", 0), plan["steps"])
        (Path(os.environ["JOB_COMMITS"]) / "progress").write_text(progress)
    attempt.with_suffix(".new").write_text(json.dumps({**plan["ends"], "pid": os.getpid()}))
    attempt.with_suffix(".new").rename(attempt)
ends = json.loads(attempt.read_text())
end = ends.get(rank)
if end == "with rank 0":
    os.kill(ends["pid"], signal.SIGKILL)
    end = -9
if end is not None and end < 0:
    os.kill(os.getpid(), -end)
if end is not None:
    sys.exit(end)
time.sleep(600)
"""
SUPERVISOR = """
import sys
from job import command
from launch.elastic.__main__ import main
command.run(lambda: main(sys.argv[2:], train=[sys.executable, "-IS", sys.argv[1] + "/rank.py", sys.argv[1]]))
"""
HEARD = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT, signal.SIGTTOU)
DONE = {"steps": 20, "ends": {"0": 0, "1": 0, "2": 0}}


class Job:
    """A job of stand-ins for ranks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run_dir = folder / "run"
        self.run_dir.mkdir()
        (folder / "rank.py").write_text(RANK)
        (folder / "supervisor.py").write_text(SUPERVISOR)

    def prepare(self, plan: Sequence[dict[str, Any]], overrides: Sequence[str]) -> None:
        (self.folder / "plan").write_text(json.dumps(plan))
        config = load_config(overrides=[f"run.dir={self.run_dir}", *overrides])
        (self.folder / "config.yaml").write_text(config.to_yaml())

    def run(
        self, *plan: dict[str, Any], least: int = 1, overrides: Sequence[str] = (), arguments: Sequence[str] = ()
    ) -> tuple[int, str]:
        """The exit code, and what was said. In this process, whose imports are done."""
        self.prepare(plan, overrides)
        rank = [sys.executable, "-IS", str(self.folder / "rank.py"), str(self.folder)]
        handlers = {number: signal.getsignal(number) for number in HEARD}
        said = io.StringIO()
        try:
            with redirect_stderr(said):
                code = main(["-np", "3", "--min-np", str(least), *arguments], train=rank)
        except JobError as error:
            code = error.exit_code
            said.write(str(error))
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        self.assert_nothing_left()
        return code, said.getvalue()

    def start(self, *plan: dict[str, Any]) -> subprocess.Popen[str]:
        """In a process of its own, which can be sent signals."""
        self.prepare(plan, ())
        command = [sys.executable, str(self.folder / "supervisor.py"), str(self.folder)]
        return subprocess.Popen(
            [*command, "-np", "3", "--min-np", "1"], env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip

    def end(self, process: subprocess.Popen[str]) -> tuple[int, str]:
        try:
            output, _ = process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            pytest.fail(f"it does not end: {process.communicate()[0]}")
        self.assert_nothing_left()
        return process.returncode, output

    def assert_nothing_left(self) -> None:
        left = [p for p in psutil.process_iter(["cmdline"]) if str(self.folder) in " ".join(p.info["cmdline"] or [])]
        assert [p.info["cmdline"] for p in left if p.status() != psutil.STATUS_ZOMBIE] == []

    def attempts(self) -> list[dict[str, Any]]:
        """How many ranks there were each time, and with which arguments."""
        return [json.loads(line) for line in (self.folder / "log").read_text().splitlines()]

    def sizes(self) -> list[int]:
        return [attempt["size"] for attempt in self.attempts()]

    def changes(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.run_dir / "changes.jsonl").read_text().splitlines()]


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


def killed(*ranks: int, steps: int = 5, went_on: int = 0) -> dict[str, Any]:
    return {"steps": steps, "from": went_on, "ends": {str(rank): -9 for rank in ranks}}


def test_after_a_death_as_many_ranks_go_on_and_the_change_is_written_down(job: Job) -> None:
    code, output = job.run(killed(1, steps=7), {**DONE, "from": 4}, arguments=["run.resume=never", "x.y=1"])
    assert code == 0, output
    assert job.attempts() == [
        {"size": 3, "arguments": ["x.y=1", "run.resume=never"]},
        {"size": 3, "arguments": ["x.y=1", "run.overwrite=false", "run.resume=auto"]},
    ]
    (change,) = job.changes()
    assert change.pop("lost_seconds") > 0
    assert change == {
        "step": 4, "ranks_before": 3, "ranks": 3, "why": "rank 1 was ended by SIGKILL", "replayed_steps": 3,
    }  # fmt: skip
    assert "rank 1 was ended by SIGKILL; going on with 3 ranks" in output
    assert "3 ranks went on after step 4; lost: 3 steps, " in output


def test_a_rank_that_fails_twice_is_left_out_and_taken_in_again_when_its_time_is_over(job: Job) -> None:
    trains = {"steps": 9, "from": 8, "ends": {}}
    plan = [killed(2), killed(2, steps=8, went_on=5), trains, DONE]
    code, output = job.run(*plan, overrides=["elastic.cooldown_seconds=1"])
    assert code == 0, output
    assert job.sizes() == [3, 3, 2, 3]
    assert [change["why"] for change in job.changes()][-1] == "a place can be used again"


def test_two_that_die_at_once_are_one_change(job: Job) -> None:
    code, output = job.run({"steps": 5, "ends": {"2": "with rank 0"}}, DONE)
    assert code == 0, output
    (change,) = job.changes()
    assert sorted(change["why"].split(" and ")) == ["rank 0 was ended by SIGKILL", "rank 2 was ended by SIGKILL"]


def test_a_rank_that_misses_another_is_not_blamed(job: Job) -> None:
    code, output = job.run({"steps": 5, "ends": {"1": -9, "2": 1}}, DONE)
    assert code == 0, output
    assert job.changes()[0]["why"] == "rank 1 was ended by SIGKILL"


def test_deaths_during_a_recovery_are_one_change_with_all_that_was_lost(job: Job) -> None:
    code, output = job.run(killed(1, steps=9), killed(0, steps=-1), {**DONE, "from": 6})
    assert code == 0, output
    (change,) = job.changes()
    assert change["why"] == "rank 1 was ended by SIGKILL; then rank 0 was ended by SIGKILL"
    assert change["replayed_steps"] == 3


def test_three_failures_without_a_step_more_end_the_job(job: Job) -> None:
    fails = {"steps": 5, "ends": {"1": 1}}
    code, output = job.run(fails, overrides=["elastic.cooldown_seconds=0"])
    assert code == 1
    assert len(job.attempts()) == 4
    assert "rank 1 ended with exit code 1; 3 failures without a step more: giving up" in output


def test_ranks_that_somebody_kills_are_given_more_than_three_attempts(job: Job) -> None:
    killed_at_once = [killed(1, steps=5), *[killed(2, steps=-1)] * 5]
    code, output = job.run(*killed_at_once, {**DONE, "from": 4}, overrides=["elastic.cooldown_seconds=0"])
    assert code == 0, output
    assert len(job.attempts()) == 7


def test_but_not_any_number_of_them(job: Job) -> None:
    code, output = job.run(*[killed(1, steps=-1)] * 11, overrides=["elastic.cooldown_seconds=0"])
    assert code == 1
    assert len(job.attempts()) == 10
    assert "rank 1 was ended by SIGKILL; 10 failures without a step more: giving up" in output


def test_the_number_of_resets_has_a_bound(job: Job) -> None:
    plan = [killed(0, steps=step) for step in range(1, 9)]
    code, output = job.run(*plan, overrides=["elastic.max_resets=2", "elastic.cooldown_seconds=0"])
    assert code == 1
    assert len(job.attempts()) == 3
    assert "more than elastic.max_resets=2 failures: giving up" in output


def test_too_few_places_for_too_long_end_it_with_75(job: Job) -> None:
    plan = [killed(2), killed(2, steps=8, went_on=5)]
    patience = ["elastic.cooldown_seconds=100", "elastic.timeout_seconds=0.2"]
    code, output = job.run(*plan, least=3, overrides=patience)
    assert code == 75, output
    assert "too few places, 2; the next can be used in 100 s" in output
    assert "fewer than 3 ranks for 0.2 s" in output


def test_ranks_that_were_preempted_by_somebody_else_end_the_job_with_75(job: Job) -> None:
    code, _ = job.run({"steps": 5, "ends": {"0": 75, "1": 75, "2": 75}})
    assert code == 75
    assert len(job.attempts()) == 1


@pytest.mark.parametrize(("steps", "expected"), [(5, 75), (-1, 143)])
def test_a_signal_stops_all_ranks_and_is_no_failure(job: Job, steps: int, expected: int) -> None:
    process = job.start({"steps": steps, "ends": {}})
    wait_for(job, process)
    process.send_signal(signal.SIGTERM)
    code, output = job.end(process)
    assert code == expected, output
    assert len(job.attempts()) == 1


def test_an_interrupt_ends_it_at_once(job: Job) -> None:
    process = job.start({"steps": 5, "ends": {}})
    wait_for(job, process)
    process.send_signal(signal.SIGINT)
    assert job.end(process)[0] == 130


def test_a_mistake_of_the_user_starts_nothing(job: Job) -> None:
    (job.folder / "check").write_text("2")
    assert job.run(DONE)[0] == 2
    assert not (job.folder / "log").exists()


def test_a_batch_that_depends_on_the_ranks_is_refused(job: Job) -> None:
    code, output = job.run(DONE, overrides=["data.batch_per_rank=10", "data.global_batch=null"])
    assert code == 2
    assert "--min-np needs data.global_batch" in output


def test_sums_in_float16_which_depend_on_the_ranks_are_refused(job: Job) -> None:
    code, output = job.run(DONE, overrides=["model.dtype=float16", "train.fp16_allreduce=true"])
    assert code == 2
    assert "--min-np cannot have train.fp16_allreduce=true" in output


def test_fewer_shards_than_places_become_as_many_whatever_the_ranks_are_then(job: Job) -> None:
    code, output = job.run(killed(1), DONE, overrides=["data.shards=2"])
    assert code == 0, output
    assert all("data.shards=3" in attempt["arguments"] for attempt in job.attempts())


def test_the_memory_of_a_job_is_removed_with_it_and_that_of_dead_ones_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_module, "_MEMORY", tmp_path)
    left = tmp_path / "horovod-gluon-job.left"
    left.mkdir()
    (left / "lock").touch()
    with memory_module.memory() as first, memory_module.memory() as second:
        assert not left.exists()
        assert first.is_dir() and second.is_dir(), "one in use is not taken for one that was left"
        assert first.stat().st_mode & 0o777 == 0o700
    assert list(tmp_path.iterdir()) == []


def wait_for(job: Job, process: subprocess.Popen[str]) -> None:
    """Until the ranks have begun."""
    while not (job.folder / "log").exists() or not list(job.folder.glob("[0-9]*[0-9]")):
        assert process.poll() is None, process.communicate()[0]
