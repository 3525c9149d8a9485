"""The bound on every wait: it fires for what is late, and for nothing else."""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from job.distributed.watchdog import Watchdog

ROOT = Path(__file__).resolve().parents[3]
PATIENCE = 20.0  # seconds for what must happen; a failing test waits so long, a passing one does not


class Alarm:
    """Receives what a watchdog says."""

    def __init__(self) -> None:
        self.messages: queue.Queue[str] = queue.Queue()

    def __call__(self, message: str) -> None:
        self.messages.put(message)

    def wait(self) -> str:
        return self.messages.get(timeout=PATIENCE)


@pytest.fixture
def alarm() -> Alarm:
    return Alarm()


@pytest.fixture
def watchdog(alarm: Alarm) -> Iterator[Watchdog]:
    watchdog = Watchdog(0.04, alarm)  # looks every 10 ms
    yield watchdog
    watchdog.close()


def test_a_wait_that_takes_too_long_is_told_with_its_name_and_limit(watchdog: Watchdog, alarm: Alarm) -> None:
    with watchdog.guard("step 7"):
        assert alarm.wait() == "step 7: no answer within 0.04 s"


def test_a_wait_may_have_a_limit_of_its_own(watchdog: Watchdog, alarm: Alarm) -> None:
    with watchdog.guard("fetching", limit_seconds=0.1):
        assert alarm.wait() == "fetching: no answer within 0.1 s"


class Clock:
    """Stands still until it is set, and tells when the watchdog has looked at it."""

    def __init__(self) -> None:
        self.now = 0.0
        self.read = threading.Semaphore(0)

    def __call__(self) -> float:
        if threading.current_thread().name == "watchdog":
            self.read.release()
        return self.now

    def wait_for_looks(self, looks: int = 6) -> None:
        for _ in range(looks):
            assert self.read.acquire(timeout=PATIENCE)


def test_the_time_for_which_the_process_was_itself_stopped_does_not_count(alarm: Alarm) -> None:
    clock = Clock()
    watchdog = Watchdog(0.04, alarm, clock=clock)  # looks every 10 ms
    with watchdog.guard("step 7", limit_seconds=30):
        for seconds in (1000.0, 1.0, 1000.0, *[1.0] * 27):  # as after SIGSTOP and SIGCONT, or docker pause
            clock.now += seconds
            clock.wait_for_looks()
            assert alarm.messages.empty(), alarm.wait()
        clock.now += 1.9
        clock.wait_for_looks()
        clock.now += 1.9
        assert alarm.wait() == "step 7: no answer within 30 s", "a wait must not go on for ever after it"
    watchdog.close()


def test_a_finished_wait_is_forgotten(watchdog: Watchdog, alarm: Alarm) -> None:
    with watchdog.guard("early", limit_seconds=0.1):
        pass
    with watchdog.guard("late", limit_seconds=0.3):  # by its deadline that of "early" has long passed
        assert alarm.wait().startswith("late:")
    assert alarm.messages.empty()


def test_a_wait_that_ended_in_an_error_is_forgotten(watchdog: Watchdog, alarm: Alarm) -> None:
    with pytest.raises(ZeroDivisionError), watchdog.guard("broken", limit_seconds=0.1):
        raise ZeroDivisionError
    with watchdog.guard("late", limit_seconds=0.3):
        assert alarm.wait().startswith("late:")


def test_the_inner_of_two_nested_waits_can_expire(watchdog: Watchdog, alarm: Alarm) -> None:
    with watchdog.guard("outer", limit_seconds=PATIENCE), watchdog.guard("inner"):
        assert alarm.wait().startswith("inner:")


def test_the_outer_wait_is_still_watched_after_an_inner_one_ended(watchdog: Watchdog, alarm: Alarm) -> None:
    with watchdog.guard("outer", limit_seconds=0.3):
        with watchdog.guard("inner", limit_seconds=0.1):
            pass
        assert alarm.wait().startswith("outer:")


def test_two_waits_of_the_same_name_are_two(watchdog: Watchdog, alarm: Alarm) -> None:
    with watchdog.guard("step", limit_seconds=0.3):
        with watchdog.guard("step", limit_seconds=PATIENCE):
            pass
        assert alarm.wait() == "step: no answer within 0.3 s"


def test_waits_of_several_threads_are_watched_apart(watchdog: Watchdog, alarm: Alarm) -> None:
    entered, leave = threading.Barrier(4), threading.Event()

    def wait(what: str, limit_seconds: float) -> None:
        with watchdog.guard(what, limit_seconds):
            entered.wait(PATIENCE)
            leave.wait(PATIENCE)

    limits = {"patient": PATIENCE, "hasty": 0.05, "calm": PATIENCE}
    threads = [threading.Thread(target=wait, args=item) for item in limits.items()]
    for thread in threads:
        thread.start()
    entered.wait(PATIENCE)
    assert alarm.wait().startswith("hasty:")
    leave.set()
    for thread in threads:
        thread.join(PATIENCE)


def test_a_closed_watchdog_ends_its_thread() -> None:
    before = set(threading.enumerate())
    watchdog = Watchdog(0.04)
    (watching,) = set(threading.enumerate()) - before
    watchdog.close()
    watching.join(PATIENCE)
    assert not watching.is_alive()


def run(script: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=PATIENCE
    )


def test_a_process_that_hangs_ends_with_1_and_shows_where_its_threads_stand() -> None:
    ended = run(
        "import threading\n"
        "from job.distributed.watchdog import Watchdog\n"
        "def wait_for_the_other_rank(): threading.Lock().acquire() and threading.Event().wait()\n"
        "def feed(): threading.Event().wait()\n"
        "threading.Thread(target=feed).start()\n"
        "with Watchdog(0.1).guard('step 7'): wait_for_the_other_rank()\n"
    )
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: step 7: no answer within 0.1 s\n")
    assert "in wait_for_the_other_rank" in ended.stderr
    assert "in feed" in ended.stderr


def test_a_wait_of_some_seconds_for_ranks_that_have_ended_ends_the_process_and_a_short_one_does_not_ask() -> None:
    ended = run(
        "import threading\n"
        "from job.distributed.watchdog import Watchdog\n"
        "now, looks = [0.0], threading.Semaphore(0)\n"
        "def clock(): looks.release(); return now[0]\n"
        "def gone(): print('asked at', now[0], flush=True); return 'rank 1 has ended' if now[0] > 2.5 else ''\n"
        "watchdog = Watchdog(0.04, clock=clock, gone=gone)\n"
        "with watchdog.guard('step 7', limit_seconds=300):\n"
        "    for now[0] in (0.5, 1.0, 1.5, 1.9):\n"
        "        for _ in range(12): looks.acquire()\n"
        "    with watchdog.guard('the sum', limit_seconds=300):\n"
        "        now[0] = 2.1\n"
        "        for _ in range(12): looks.acquire()\n"
        "        now[0] = 2.6\n"
        "        threading.Event().wait()\n"
    )
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: step 7: rank 1 has ended, and this rank would wait for ever\n")
    assert set(ended.stdout.splitlines()) == {"asked at 2.1", "asked at 2.6"}


def test_a_watchdog_keeps_no_process_alive() -> None:
    ended = run("from job.distributed.watchdog import Watchdog\nWatchdog(300)")
    assert (ended.returncode, ended.stderr) == (0, "")
