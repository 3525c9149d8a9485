"""The roll call: who is late is found without a collective."""

from __future__ import annotations

import errno
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest

from job.distributed import roll_call
from job.distributed.roll_call import RollCall

ROOT = Path(__file__).resolve().parents[3]
ANSWERING = """
import signal
from job.distributed.roll_call import RollCall
call = RollCall(1, lambda: 7)
print(*call.address, flush=True)
signal.pause()
"""


@pytest.fixture(autouse=True)
def impatient() -> Iterator[None]:
    with mock.patch.object(roll_call, "_ANSWER_SECONDS", 0.5):
        yield


def ranks(*entered: int) -> list[RollCall]:
    calls = [RollCall(rank, lambda count=count: count) for rank, count in enumerate(entered)]  # type: ignore[misc]
    for call in calls:
        call.peers = [other.address for other in calls]
    return calls


def test_the_rank_that_has_entered_fewest_collectives_is_late() -> None:
    for call in ranks(7, 6, 7):
        assert call.late().startswith("late: rank 1, alive, but behind the others")


def test_several_may_be_late() -> None:
    assert ranks(7, 6, 5, 7)[0].late().startswith("late: ranks 1, 2, alive")


def test_a_rank_that_does_not_answer_is_named() -> None:
    calls = ranks(7, 7, 7)
    nobody = RollCall(9, lambda: 0).address
    with mock.patch.object(calls[0], "peers", [calls[0].address, (nobody[0], 1), calls[2].address]):
        assert calls[0].late() == "late: rank 1, silent: stopped, dead or cut off"


def test_if_nobody_answers_the_fault_may_be_here() -> None:
    (call,) = ranks(7)
    call.peers = [call.address, (call.address[0], 1), (call.address[0], 2)]
    assert call.late() == "none of the other ranks answers: this one may be cut off"


def test_if_all_are_level_nobody_is_accused() -> None:
    assert ranks(7, 7)[0].late() == ""


def test_before_the_ranks_know_each_other_nobody_is_accused() -> None:
    assert RollCall(0, lambda: 1).late() == ""


def test_whoever_is_asked_shows_its_stacks_once(capfd: pytest.CaptureFixture[str]) -> None:
    first, _ = ranks(7, 6)
    first.late()
    first.late()
    assert capfd.readouterr().err.count("rank 1: another rank waits too long; here are") == 1


def until(call: RollCall, reached: Callable[[str], bool], seconds: float = 20.0) -> str:
    """What is said of ranks that have ended once ``reached`` holds, asked as often as the watchdog asks."""
    end = time.monotonic() + seconds
    while not reached(told := call.gone()):
        assert time.monotonic() < end, told
        time.sleep(0.01)  # between two looks
    return told


@pytest.fixture
def other() -> Iterator[subprocess.Popen[str]]:
    """Rank 1, a process of its own."""
    with subprocess.Popen([sys.executable, "-c", ANSWERING], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


def pair(other: subprocess.Popen[str]) -> RollCall:
    assert other.stdout is not None
    host, port = other.stdout.readline().split()
    call = RollCall(0, lambda: 7)
    call.peers = [call.address, (host, int(port))]
    return call


def test_a_rank_that_has_been_killed_is_known_to_have_ended(other: subprocess.Popen[str]) -> None:
    call = pair(other)
    until(call, lambda told: bool(call._present))
    other.kill()
    assert until(call, bool) == "rank 1 has ended"
    call.all_stay = False
    assert call.gone() == "", "a job that ends has ranks that end"


def test_a_rank_that_is_stopped_may_come_back(other: subprocess.Popen[str]) -> None:
    call = pair(other)
    until(call, lambda told: bool(call._present))
    other.send_signal(signal.SIGSTOP)
    assert not any(call.gone() for _ in range(100))
    other.send_signal(signal.SIGCONT)
    call._present.clear()
    assert until(call, lambda told: bool(call._present)) == ""


def test_a_firewall_that_refuses_from_the_start_is_not_the_end_of_a_rank() -> None:
    call = RollCall(0, lambda: 7)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as closed:
        closed.bind((call.address[0], 0))
        call.peers = [call.address, closed.getsockname()]
    until(call, lambda told: call._refused[1] > 2 * roll_call._REFUSALS)
    assert call.gone() == ""


def test_a_lost_route_is_not_the_end_of_a_rank() -> None:
    call = RollCall(0, lambda: 7)
    call.peers = [call.address, (call.address[0], 9)]
    unreachable = struct.pack("I12x", errno.EHOSTUNREACH)
    queue = [(b"", [(socket.IPPROTO_IP, roll_call._IP_RECVERR, unreachable)], 0, call.peers[1])] * 9
    with mock.patch.object(call, "_received", lambda receive: iter(queue)):
        assert list(call._refusals()) == []


def test_an_answer_makes_up_for_what_was_refused_before() -> None:
    call = RollCall(0, lambda: 7)
    few = [1] * (roll_call._REFUSALS - 1)
    with mock.patch.object(call, "_answers", lambda: [1]), mock.patch.object(call, "_refusals", lambda: few):
        assert [call.gone() for _ in range(5)] == [""] * 5
    with mock.patch.object(call, "_answers", lambda: []), mock.patch.object(call, "_refusals", lambda: few):
        assert call.gone() == "rank 1 has ended"


def test_what_strangers_send_is_no_answer() -> None:
    call, stranger = RollCall(0, lambda: 7), socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    call.peers = [call.address, (call.address[0], 9)]
    call.gone()
    stranger.sendto(b"rank one", (call.address[0], call._caller.getsockname()[1]))
    stranger.sendto(b"what?", call.address)
    until(call, lambda told: call._refused[1] > 2)
    assert not call._present


def test_a_call_shows_no_stacks(capfd: pytest.CaptureFixture[str]) -> None:
    first, _ = ranks(7, 6)
    until(first, lambda told: first._present == {1})
    assert capfd.readouterr().err == ""
