"""``job/train.py`` with a fault planted: ``FAULT=ACTION:POINT:RANK:STEP python -m tests.faults.broken [arguments]``.

The fault strikes once, on the given rank (``all`` for every one), when the run reaches the point after so many steps.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from typing import Any

from job.distributed.placement import placement, share_cores
from job.quick_import import quicken

share_cores()
quicken()

import numpy as np

from job import command, train
from job.checkpoints import store
from job.checkpoints.state import RunState
from job.distributed.comm import Comm, HorovodComm
from job.training.learner import Learner


def ancestor(name: str) -> int:
    """The nearest process above this one whose command line holds ``name``."""
    pid = os.getpid()
    while pid > 1:
        with open(f"/proc/{pid}/stat") as stat:
            pid = int(stat.read().rpartition(")")[2].split()[1])
        with open(f"/proc/{pid}/cmdline") as arguments:
            words = arguments.read().split("\0")
            if any(word.endswith(name) for word in words[:2]) and "/bin/sh" not in words[0]:
                return pid
    raise LookupError(name)


def signal_self(number: int) -> None:
    os.kill(os.getpid(), number)


def second_signal() -> None:
    """As a launcher would: the second after the echo of the first has died away. Between them the rank hangs."""
    signal_self(signal.SIGTERM)
    time.sleep(2)  # what is tested is that the second is told from an echo of the first
    signal_self(signal.SIGTERM)
    time.sleep(600)


def full_disk() -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    store._write = fail  # type: ignore[assignment]


ACTIONS = {
    "kill": lambda: signal_self(signal.SIGKILL),
    "term": lambda: signal_self(signal.SIGTERM),
    "usr1": lambda: signal_self(signal.SIGUSR1),
    "twice": second_signal,
    "stop": lambda: signal_self(signal.SIGSTOP),
    "sleep": lambda: time.sleep(600),
    "kill-launcher": lambda: os.kill(ancestor("horovodrun"), signal.SIGKILL),
    "term-launcher": lambda: os.kill(ancestor("horovodrun"), signal.SIGTERM),
    "full": full_disk,
}

action, point, rank, after = os.environ.get("FAULT", "none:none:0:0").split(":")
mine = rank in ("all", str(placement().rank))


def plant(owner: Any, name: str, steps: Any, before: bool = True) -> None:
    whole, struck = getattr(owner, name), []

    def broken(*arguments: Any, **options: Any) -> Any:
        strikes = mine and not struck and steps(*arguments) == int(after)
        if strikes:
            struck.append(True)
        if strikes and before:
            ACTIONS[action]()
        result = whole(*arguments, **options)
        if strikes and not before:
            ACTIONS[action]()
        return result

    setattr(owner, name, broken)


def plant_nan() -> None:
    whole = Learner._fed

    def broken(self: Learner, *arguments: Any) -> Any:
        feeds = whole(self, *arguments)
        if mine and self.steps == int(after):
            feeds[0]["data"] = feeds[0]["data"] * (np.nan if action == "nan" else np.inf)
        return feeds

    Learner._fed = broken  # type: ignore[method-assign]


if action == "alarm":  # kills as surely as SIGKILL, by the kernel's clock, whatever the process is doing
    plant(train, "connect", lambda *_: 0)
    ACTIONS["alarm"] = lambda: signal.setitimer(signal.ITIMER_REAL, float(point))
elif action in ("nan", "inf"):
    plant_nan()
elif point == "start":
    plant(train, "connect", lambda *_: 0)
elif point == "step":
    plant(Learner, "step", lambda learner, *_: learner.steps)
elif point == "allreduce":
    calls: list[None] = []
    plant(HorovodComm, "allreduce_", lambda *_: calls.append(None) or len(calls), before=False)
elif point == "save":
    plant(RunState, "state_dict", lambda state: state.learner.steps)
elif point == "write":
    plant(store, "_manifest", lambda step, *_: step)
elif point == "evaluation":
    plant(Learner, "evaluate", lambda learner, *_: learner.steps)


def timed() -> None:
    """Train, and say how long it took from where an alarm would start to run."""
    started: list[float] = []
    connect = train.connect

    def connect_and_note(*arguments: Any, **options: Any) -> Comm:
        started.append(time.monotonic())
        return connect(*arguments, **options)

    train.connect = connect_and_note  # type: ignore[assignment]
    train.main()
    print(f"from connecting to the end: {time.monotonic() - started[0]:.3f} s", flush=True)


if __name__ == "__main__":
    command.run(timed if action == "time" else train.main)
