"""Which hosts a job may use, while the list of hosts changes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from job.errors import UsageError
from launch.hosts import roster as roster_module
from launch.hosts.checks import Answer, Found, Problem
from launch.hosts.hostfile import Host
from launch.hosts.roster import Roster, discover

BAD = "bad"  # the name of a host that is not fit


def problems_of(hosts: Sequence[Host]) -> list[Problem]:
    return [Problem(host.name, "disk", "is full", "free some of it") for host in hosts if host.name == BAD]


class Listed:
    """A list of hosts that a test changes, and a roster of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *hosts: Host, cooldown_seconds: float = 100.0) -> None:
        monkeypatch.setattr(roster_module, "_LISTING_SECONDS", 0.01)
        self.hosts: Sequence[Host] = hosts
        self.said: list[str] = []
        self.fails = False
        self.starts = 1  # of all hosts
        self.asked: list[str] = []
        self.reads = threading.Semaphore(0)
        self.roster = Roster(self.read, self.examine, hosts, self.said.append, cooldown_seconds)
        self.roster.take_in(hosts)

    def read(self) -> Sequence[Host]:
        self.reads.release()
        if self.fails:
            raise UsageError("hosts: cannot be read")
        return self.hosts

    def examine(self, hosts: Sequence[Host], before: Sequence[Answer]) -> Found:
        self.asked += [host.name for host in hosts]
        facts = {"started": f"start {self.starts}"}
        return [Answer(host.name, facts=facts, gpus=2 if host.name == "gpus" else 0) for host in hosts], problems_of(
            hosts
        )

    def names(self) -> list[str]:
        return [*self.roster.fit()]

    def becomes(self, *names: str) -> None:
        """Wait until exactly these can be used."""
        self.until(lambda: self.names() == [*names])

    def until(self, condition: Callable[[], bool]) -> None:
        for _ in range(500):
            assert self.reads.acquire(timeout=10)
            if condition():
                return
        pytest.fail(f"can be used: {self.names()}")


def test_a_host_that_is_not_fit_is_told_once_and_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = Listed(monkeypatch, Host("a", 2), Host(BAD), Host("gpus"), Host("b"))
    listed.roster.take_in([Host(BAD)])
    assert listed.names() == ["a", "gpus", "b"]
    assert listed.said == ["without bad: disk: is full; free some of it"]
    assert [listed.roster.slots(name) for name in listed.names()] == [2, 2, 1]


def test_hosts_come_and_go_with_the_list_and_a_list_that_cannot_be_read_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = Listed(monkeypatch, Host("a"))
    listed.roster.keep()
    listed.hosts = [Host("b"), Host("a")]
    listed.becomes("b", "a")
    listed.fails = True
    listed.until(lambda: bool(listed.said))
    listed.becomes("b", "a")
    assert listed.said == ["hosts: cannot be read; the hosts stay as they are"]
    listed.fails, listed.hosts = False, [Host("b")]
    listed.becomes("b")
    assert listed.roster.slots("a") == 1, "whoever has just seen it as fit may ask"
    listed.roster.close()


def test_a_host_that_was_lost_is_checked_again_at_once_and_then_only_later(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = Listed(monkeypatch, Host("a"), Host("b"))
    listed.roster.keep()
    listed.roster.lost("a")
    listed.becomes("a", "b")
    listed.roster.lost("a")
    for _ in range(5):
        assert listed.reads.acquire(timeout=10)
    assert listed.names() == ["b"]
    listed.roster.close()


def test_a_host_that_was_told_to_leave_is_used_again_only_when_it_was_off_the_list(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    listed = Listed(monkeypatch, Host("a"), Host("b"))
    listed.roster.keep()
    listed.roster.leaves("a")
    for _ in range(5):
        assert listed.reads.acquire(timeout=10)
        assert listed.names() == ["b"]
    listed.hosts = [Host("b")]
    for _ in range(3):
        assert listed.reads.acquire(timeout=10)
    listed.hosts = [Host("a"), Host("b")]
    listed.becomes("a", "b")
    listed.roster.close()


def test_a_host_that_was_told_to_leave_is_used_again_when_it_was_started_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a pod that is replaced under its name, so soon that no list was without it."""
    listed = Listed(monkeypatch, Host("a"), Host("b"), cooldown_seconds=0.01)
    listed.roster.keep()
    listed.roster.leaves("a")
    listed.until(lambda: listed.asked.count("a") > 2)
    assert listed.names() == ["b"]
    listed.starts += 1
    listed.becomes("a", "b")
    listed.roster.lost("a")  # which is its first failure: leaving was none
    listed.becomes("a", "b")
    listed.roster.close()


def test_a_host_that_leaves_is_not_asked_while_its_ranks_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = Listed(monkeypatch, Host("a"), Host("b"))
    listed.roster.keep()
    listed.starts += 1
    listed.roster.leaves("a")
    for _ in range(5):
        assert listed.reads.acquire(timeout=10)
    assert (listed.names(), listed.asked) == (["b"], ["a", "b"])
    listed.roster.close()


def script(folder: Path, text: str) -> Path:
    file = folder / "discover"
    file.write_text(f"#!/bin/sh\n{text}\n")
    file.chmod(0o755)
    return file


def test_a_script_prints_the_hosts(tmp_path: Path) -> None:
    assert discover(script(tmp_path, "echo a:2; echo b")) == [Host("a", 2), Host("b")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("echo no answer >&2; exit 3", "ended with exit code 3: no answer"),
        (":", "names no host"),
        ("exec sleep 600", "printed no hosts within"),
    ],
)
def test_a_script_that_does_not_is_told(
    tmp_path: Path, text: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roster_module, "_SCRIPT_SECONDS", 0.5)
    with pytest.raises(UsageError, match=message):
        discover(script(tmp_path, text))


def test_a_script_that_cannot_be_run_is_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be run"):
        discover(tmp_path)
