"""A worker of ``horovodrun --min-np``. The protocol is Horovod's own, ranks are programs that do what a test says."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional

import pytest
from horovod.runner.common.util.hosts import INVALID_SLOT_INFO, SlotInfo
from horovod.runner.elastic.rendezvous import create_rendezvous_handler
from horovod.runner.elastic.worker import HostUpdateResult, WorkerNotificationClient
from horovod.runner.gloo_run import create_run_env_vars, create_slot_env_vars
from horovod.runner.http.http_server import RendezvousServer

from job.checkpoints import commits
from job.config import load_config
from job.errors import JobError, UsageError
from launch.elastic.horovodrun import main

# Attempt N does what the plan says: it tells its steps, and ends with a code or by a signal, or waits to be asked to.
RANK = """
import json, os, signal, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
if "--check" in sys.argv:
    print((folder / "config.yaml").read_text())
    sys.exit(0)
signal.signal(signal.SIGTERM, lambda *_: os._exit(75))
log = folder / "log"
number = len(log.read_text().splitlines()) if log.exists() else 0
plan = json.loads((folder / "plan").read_text())[number]
names = ("RANK", "SIZE", "LOCAL_RANK", "ELASTIC")
seen = {name: os.environ.get(f"HOROVOD_{name}") for name in names}
with open(log, "a") as stream:
    stream.write(json.dumps({**seen, "begin": sys.argv[2:]}) + "\\n")
if "steps" in plan:
    progress = "%12d %12d" % (plan.get("from", 0), plan["steps"])
    (Path(os.environ["JOB_COMMITS"]) / "progress").write_text(progress)
if plan.get("ends", 0) < 0:
    os.kill(os.getpid(), -plan["ends"])
if "ends" in plan:
    sys.exit(plan["ends"])
(folder / "waits").touch()
time.sleep(600)
"""
HEARD = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT)


def slot(rank: int, size: int, local_rank: int = 0) -> SlotInfo:
    return SlotInfo("localhost", rank, local_rank, 0, size, size, 1)


class Driver:
    """What Horovod's handler asks of its driver."""

    def __init__(self, slots: list[SlotInfo]) -> None:
        self.slots = slots  # those that it is going to give
        self.ready = 0
        self.client: Optional[WorkerNotificationClient] = None

    def record_ready(self, host: str, local_rank: int) -> None:
        self.ready += 1

    def get_slot_info(self, host: str, local_rank: int) -> SlotInfo:
        return self.slots.pop(0) if self.slots else INVALID_SLOT_INFO

    def register_worker_server(self, host: str, local_rank: int, addresses: Any, key: Any) -> None:
        self.client = WorkerNotificationClient(addresses, key, 0)


class Job:
    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self._monkeypatch = folder, monkeypatch
        self.run_dir = folder / "run"
        self.run_dir.mkdir()
        (folder / "rank.py").write_text(RANK)
        (folder / "config.yaml").write_text(load_config(overrides=[f"run.dir={self.run_dir}"]).to_yaml())

    def run(self, first: SlotInfo, *given: SlotInfo, plan: list[dict[str, int]], arguments: list[str] = []) -> int:  # noqa: B006
        """The exit code of a worker that has been started as ``first``, and is given the other slots then."""
        (self.folder / "plan").write_text(json.dumps(plan))
        self.driver = Driver([*given])
        server = RendezvousServer()
        port = server.start(create_rendezvous_handler(self.driver))
        for name, value in {
            **create_run_env_vars("127.0.0.1", ["lo"], port, elastic=True),
            **create_slot_env_vars(first),
        }.items():
            self._monkeypatch.setenv(name, str(value))
        self._monkeypatch.setenv("no_proxy", "")  # what main adds goes with it
        handlers = {number: signal.getsignal(number) for number in HEARD}
        try:
            return main(arguments, train=[sys.executable, "-IS", str(self.folder / "rank.py"), str(self.folder)])
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            server.stop()

    def attempts(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "log").read_text().splitlines()]

    def changes(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.run_dir / "changes.jsonl").read_text().splitlines()]

    def when_it_waits(self, action: Any) -> None:
        """In another thread, once a rank waits to be asked to stop."""

        def wait() -> None:
            while not (self.folder / "waits").exists():
                os.sched_yield()
            action()

        threading.Thread(target=wait, daemon=True).start()


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    return Job(tmp_path, monkeypatch)


@pytest.fixture(autouse=True)
def rescued(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Path]]:
    """The runs whose last commit was brought to the disk."""
    runs: list[Path] = []
    monkeypatch.setattr(commits, "rescue", lambda memory, run_dir: runs.append(run_dir))
    yield runs


def test_after_a_death_the_worker_is_ready_takes_its_next_rank_and_goes_on(job: Job, rescued: list[Path]) -> None:
    plan = [{"steps": 7, "ends": 1}, {"from": 5, "steps": 9, "ends": -9}, {"from": 9, "steps": 20, "ends": 0}]
    assert job.run(slot(0, 2), slot(0, 3), slot(0, 1), plan=plan, arguments=["run.overwrite=true"]) == 0
    seen = [(attempt["RANK"], attempt["SIZE"], attempt["ELASTIC"]) for attempt in job.attempts()]
    assert seen == [("0", "2", None), ("0", "3", None), ("0", "1", None)], "a rank asks the driver for nothing"
    begin, *later = [attempt["begin"] for attempt in job.attempts()]
    assert begin == ["run.overwrite=true"]
    assert later == [["run.overwrite=false", "run.resume=auto"]] * 2
    first, second = job.changes()
    assert (first["step"], first["ranks_before"], first["ranks"], first["replayed_steps"]) == (5, 2, 3, 2)
    assert (second["step"], second["ranks_before"], second["ranks"], second["why"]) == (9, 3, 1, "a rank failed")
    assert job.driver.ready == 2
    assert rescued == [], "others may go on"


def test_when_hosts_change_the_rank_stops_with_a_checkpoint_and_another_takes_its_place(job: Job) -> None:
    def change() -> None:
        job.driver.client.notify_hosts_updated(0, HostUpdateResult.added)  # type: ignore[union-attr]

    job.when_it_waits(change)
    assert job.run(slot(0, 2), slot(0, 3), plan=[{"steps": 4}, {"from": 4, "steps": 9, "ends": 0}]) == 0
    (change_,) = job.changes()
    assert (change_["why"], change_["ranks"], change_["replayed_steps"]) == ("hosts joined or left", 3, 0)


def test_the_driver_is_not_looked_for_behind_a_proxy(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setattr(urllib.request, "_opener", None)  # it would remember that there was none
    assert job.run(slot(0, 2), slot(0, 2), plan=[{"steps": 4, "ends": 1}, {"steps": 9, "ends": 0}]) == 0


def test_a_slot_that_is_not_needed_any_more_is_left(job: Job) -> None:
    assert job.run(slot(1, 2, local_rank=1), plan=[{"ends": 1}]) == 0
    assert job.driver.ready == 1


def test_a_worker_that_joins_replaces_no_run(job: Job) -> None:
    job.run(slot(2, 3, local_rank=2), plan=[{"ends": 0}], arguments=["run.overwrite=true"])
    assert job.attempts()[0]["begin"] == ["run.overwrite=false", "run.resume=auto"]


def test_one_that_is_asked_to_stop_does_not_go_on(job: Job) -> None:
    job.when_it_waits(lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert job.run(slot(0, 2), slot(0, 2), plan=[{"steps": 4}, {"steps": 9, "ends": 0}]) == 75
    assert job.driver.ready == 0


def test_failures_without_a_step_more_end_the_worker_and_save_the_last_commit(job: Job, rescued: list[Path]) -> None:
    slots = [slot(0, 2)] * 20
    assert job.run(*slots, plan=[{"steps": 4, "ends": 1}, *[{"from": 4, "steps": 4, "ends": 1}] * 19]) == 1
    assert len(job.attempts()) == 1 + 5
    assert rescued == [job.run_dir]


def test_a_mistake_of_the_user_ends_it(job: Job) -> None:
    assert job.run(slot(1, 2, local_rank=1), slot(1, 2), plan=[{"ends": 2}]) == 2
    assert job.driver.ready == 0


def test_more_ranks_than_shards_would_change_the_bits_and_are_refused(job: Job) -> None:
    with pytest.raises(UsageError, match=r"9 ranks need data\.shards=9 or more"):
        job.run(slot(0, 2), slot(0, 9), plan=[{"steps": 4, "ends": 1}])


def test_a_driver_that_is_gone_is_told(job: Job, monkeypatch: pytest.MonkeyPatch, rescued: list[Path]) -> None:
    monkeypatch.setattr(Driver, "get_slot_info", lambda *_: None)
    with pytest.raises(JobError, match="horovodrun does not say how to go on"):
        job.run(slot(0, 2), plan=[{"steps": 4, "ends": 1}])
    assert rescued == [job.run_dir]
