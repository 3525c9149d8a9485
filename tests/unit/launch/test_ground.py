"""Hosts as the ground of a job whose ranks may die. The agents are real and run here; the ranks are scripts."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from job.errors import JobError
from launch.elastic.places import Place
from launch.elastic.supervisor import Ended
from launch.hosts.checks import Answer
from launch.hosts.ground import HostGang, HostGround
from launch.hosts.supervise import Site

AGENT = [sys.executable, str(Path(__file__).resolve().parents[3] / "launch" / "hosts" / "agent.py")]
PATIENCE = 30.0
# What rank R of attempt A does is in the file A.R of the folder; all tell two steps.
RANK = """
printf '%12d %12d' 3 5 > $JOB_COMMITS/progress
echo $HOROVOD_RANK $HOROVOD_LOCAL_RANK $HOROVOD_SIZE $HOST "$@" >> $FOLDER/log
. $FOLDER/rank$HOROVOD_RANK
"""
WILLING = "trap 'exit 75' TERM; touch $FOLDER/ready$HOROVOD_RANK; while :; do sleep 0.05; done"


class Fit:
    """A roster on which all hosts are fit."""

    def __init__(self, hosts: Mapping[str, int]) -> None:
        self.hosts = dict(hosts)
        self.gone: list[str] = []

    def fit(self) -> dict[str, Answer]:
        return {name: Answer(name) for name in self.hosts}

    def slots(self, name: str) -> int:
        return self.hosts[name]

    def lost(self, name: str) -> None:
        self.gone.append(name)
        del self.hosts[name]

    leaves = lost

    def close(self) -> None:
        """Nothing to stop."""


class Ground(HostGround):
    """Of hosts whose run.dir is one folder, or one each."""

    def __init__(self, folder: Path, hosts: Mapping[str, int], shared: bool = True) -> None:
        self.folder, self.shared = folder, shared
        self.roster = Fit(hosts)
        self.said: list[str] = []
        plan = {"command": ["bash", "-c", RANK, "rank"], "environment": {"FOLDER": str(folder)}}
        super().__init__(self.roster, self.site_of, self.network_of, plan, self.said.append)  # type: ignore[arg-type]

    def site_of(self, answer: Answer) -> Site:
        settings: dict[str, Any] = {
            "stay": True, "directory": str(self.folder), "run_dir": str(self.run_dir(answer.host)), "command": [],
            "environment": {}, "ranks": [], "silence_seconds": 60, "grace_seconds": 0.2,
        }  # fmt: skip
        return Site(answer.host, AGENT, settings)

    def run_dir(self, host: str) -> Path:
        return self.folder / ("run" if self.shared else f"run-{host}")

    def network_of(self, answers: Sequence[Answer], port: int) -> dict[str, dict[str, str]]:
        return {answer.host: {"HOST": answer.host} for answer in answers}

    def does(self, rank: int, script: str) -> None:
        (self.folder / f"rank{rank}").write_text(script)

    def checkpoint(self, step: int, *hosts: str) -> None:
        for host in hosts:
            (self.run_dir(host) / "checkpoints" / f"step-{step:08d}").mkdir(parents=True, exist_ok=True)

    def begin(self, ranks: int, *begin: str) -> HostGang:
        wait_for(lambda: len(self.places()) == sum(self.roster.hosts.values()))
        return self.start(begin, self.places(), ranks)

    def log(self) -> list[str]:
        return sorted((self.folder / "log").read_text().splitlines())


def wait_for(condition: Any) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "waited for too long"
        time.sleep(0.01)


def end_of(gang: HostGang) -> list[Ended]:
    """All that end from now on, until none runs any more."""
    ended: list[Ended] = []
    wait_for(lambda: ended.extend(gang.ended()) or gang.over)
    return ended


@pytest.fixture
def grounds() -> Iterator[list[Ground]]:
    made: list[Ground] = []
    yield made
    for ground in made:
        ground.close()


def test_ranks_run_where_they_are_to_and_what_becomes_of_them_is_known(grounds: list[Ground], tmp_path: Path) -> None:
    grounds.append(ground := Ground(tmp_path, {"a": 2, "b": 2}))
    ground.does(0, "exit 0")
    ground.does(1, "kill -9 $$")
    ground.does(2, WILLING)
    gang = ground.begin(3, "x.y=1")
    assert gang.places == [Place("a", 0), Place("a", 1), Place("b", 0)]
    ended: list[Any] = []
    wait_for(lambda: ended.extend(gang.ended()) or len(ended) == 2)
    assert sorted(map(str, ended)) == ["rank 0 on a ended with exit code 0", "rank 1 on a was ended by SIGKILL"]
    assert ground.progress() == (3, 5)
    wait_for((tmp_path / "ready2").exists)
    gang.signal(signal.SIGTERM)
    assert [(rank.rank, rank.code, rank.host) for rank in end_of(gang)] == [(2, 75, "b")]
    assert gang.end() == []
    assert ground.log() == ["0 0 3 a x.y=1", "1 1 3 a x.y=1", "2 0 3 b x.y=1"]
    assert ground.together(Place("a", 1)) == [Place("a", 0), Place("a", 1)]


def test_a_lost_host_loses_its_ranks_and_the_others_are_killed_and_started_anew(
    grounds: list[Ground], tmp_path: Path
) -> None:
    grounds.append(ground := Ground(tmp_path, {"a": 1, "b": 1}))
    for rank in range(2):
        ground.does(rank, f"trap '' TERM; echo $PPID > $FOLDER/agent{rank}; while :; do sleep 0.05; done")
    gang = ground.begin(2)
    wait_for(lambda: (tmp_path / "agent1").exists() and (tmp_path / "agent1").read_text())
    os.kill(int((tmp_path / "agent1").read_text()), signal.SIGKILL)
    ended: list[Any] = []
    wait_for(lambda: ended.extend(gang.ended()) or ended)
    assert [str(rank) for rank in ended] == ["b was lost: its agent was ended by signal 9 (Killed)"]
    assert gang.end() == [], "what was killed from here was not lost"
    assert gang.over
    assert ground.roster.gone == ["b"]
    ground.does(0, "exit 0")
    again = ground.begin(2)
    assert [rank.code for rank in end_of(again)] == [0]
    assert again.places == [Place("a", 0)]


def test_rank_0_goes_where_the_newest_commit_is(grounds: list[Ground], tmp_path: Path) -> None:
    grounds.append(ground := Ground(tmp_path, {"a": 1, "b": 1}))
    commit = "[ $HOST = {} ] && mkdir -p $JOB_COMMITS/step-{:08d}; exit 1"
    ground.does(0, commit.format("b", 7))
    ground.does(1, commit.format("b", 7))
    ground.checkpoint(4, "a")
    first = ground.begin(2)
    end_of(first)
    first.end()
    second = ground.begin(2)
    assert second.places == [Place("b", 0), Place("a", 0)]
    end_of(second)
    second.end()
    ground.checkpoint(8, "a")
    assert ground.begin(2).places == [Place("a", 0), Place("b", 0)], "the disk is newer than any commit"


def test_rank_0_does_not_go_where_its_files_are_not_seen(grounds: list[Ground], tmp_path: Path) -> None:
    grounds.append(ground := Ground(tmp_path, {"a": 1, "b": 1}, shared=False))
    ground.checkpoint(4, "a")
    for rank in range(2):
        ground.does(rank, "echo $PPID > $FOLDER/agent$HOROVOD_RANK; while :; do sleep 0.05; done")
    gang = ground.begin(2)
    wait_for(lambda: ground.progress() and ground.said)
    wait_for(lambda: (tmp_path / "agent0").exists() and (tmp_path / "agent0").read_text())
    assert ground.said == ["warning: b: run.dir is not that of a; if a is lost, the job ends"]
    os.kill(int((tmp_path / "agent0").read_text()), signal.SIGKILL)
    wait_for(lambda: gang.ended())
    gang.end()
    with pytest.raises(JobError, match="rank 0 ran on a, and no host that is left sees the checkpoints"):
        ground.begin(1)


def test_an_agent_that_is_told_to_leave_says_so_and_its_ranks_go_on(grounds: list[Ground], tmp_path: Path) -> None:
    grounds.append(ground := Ground(tmp_path, {"a": 1, "b": 1}))
    for rank in range(2):
        ground.does(rank, f"echo $PPID > $FOLDER/agent{rank}; {WILLING}")
    gang = ground.begin(2)
    wait_for(lambda: all((tmp_path / f"ready{rank}").exists() for rank in range(2)))
    agent = psutil.Process(int((tmp_path / "agent1").read_text()))
    agent.terminate()
    wait_for(lambda: ground.places() == [Place("a", 0)])
    assert gang.ended() == []
    gang.signal(signal.SIGTERM)
    assert [rank.code for rank in end_of(gang)] == [75, 75]
    assert agent.is_running()
    wait_for(lambda: ground.places() and not agent.is_running())  # also where too few are left to start others
