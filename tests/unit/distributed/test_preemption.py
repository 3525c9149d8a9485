"""Signals: heard also while the main thread waits where Python runs no handlers, the second one at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from job.distributed.comm import Comm
from job.distributed.preemption import Preemption

ROOT = Path(__file__).resolve().parents[3]
PATIENCE = 20.0


def heard(preemption: Preemption, number: int) -> str:
    """Send a signal to this process and wait until the listening thread has noted it."""
    os.kill(os.getpid(), number)
    poll = threading.Event()
    for _ in range(int(PATIENCE / 0.01)):
        if preemption.signal:
            break
        poll.wait(0.01)
    return preemption.signal


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_is_noted_and_nothing_else_happens(name: str) -> None:
    with Preemption() as preemption:
        assert preemption.signal == ""
        assert heard(preemption, getattr(signal, name)) == name


def test_afterwards_signals_do_what_they_did_before() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    with Preemption():
        pass
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == before


def test_the_message_names_who_was_asked_and_the_step() -> None:
    with Preemption() as preemption:
        heard(preemption, signal.SIGUSR1)
        stopped = preemption.preempted(Comm(), 7)
    assert "stopped after step 7, because rank 0 received SIGUSR1" in str(stopped)
    assert stopped.exit_code == 75


# ctypes lets the main thread wait in C, as it does inside MXNet: Python's own handlers do not run there.
DEAF = """
import ctypes, os, signal, sys, threading, time
from job.distributed import preemption
preemption._ECHO_SECONDS = float(sys.argv[1])
heard = preemption.Preemption()
def send():
    os.kill(os.getpid(), signal.SIGTERM)
    while not heard.signal: time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGTERM)
    print("sent", flush=True)
with heard:
    threading.Thread(target=send, daemon=True).start()
    semaphore = ctypes.create_string_buffer(64)
    libc = ctypes.CDLL(None)
    libc.sem_init(semaphore, 0, 0)
    while libc.sem_wait(semaphore): pass
"""


def test_a_second_signal_ends_a_process_whose_main_thread_hears_nothing() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", DEAF, "0"], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        timeout=PATIENCE,
    )  # fmt: skip
    assert ended.returncode == 128 + signal.SIGTERM
    assert ended.stderr == "error: SIGTERM for the second time: ending at once\n"


def test_an_echo_of_the_first_signal_is_not_a_second_one() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", DEAF, "1000"], env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "sent\n"
        assert process.poll() is None
    finally:
        process.kill()
        process.communicate()


def test_in_another_thread_than_the_main_one_it_says_that_it_hears_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """As in a notebook, whose cells may run in a thread."""
    heard: list[str] = []

    def enter() -> None:
        with Preemption() as preemption:
            heard.append(preemption.signal)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert heard == [""]
    assert "warning: not in the main thread" in capsys.readouterr().err
