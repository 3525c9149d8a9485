"""``job/train.py`` with a fault planted: ``FAULT=ACTION:POINT:RANK:STEP python -m tests.faults.broken [arguments]``.

The fault strikes once, on the given rank (``all`` for every one), when the run reaches the point after so many steps.
There may be several, with spaces between them; ``0+2`` are the ranks 0 and 2. In a job whose ranks are started again,
each strikes once, after those before it. The folder ``FAULT_MARKS`` remembers it.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from pathlib import Path
from typing import Any

from job.distributed.placement import placement, share_cores
from job.distributed.standby import wait_for_rank
from job.quick_import import quicken

share_cores()
quicken(onnx=False)

import numpy as np

from job import command, train
from job.checkpoints import store
from job.checkpoints.resume import Checkpoints
from job.checkpoints.state import RunState
from job.distributed.comm import Comm
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


class Fault:
    """One of the faults that ``FAULT`` names."""

    def __init__(self, number: int, text: str) -> None:
        self.number = number
        self.action, self.point, rank, self.after = text.split(":")
        self.mine = rank == "all" or str(placement().rank) in rank.split("+")
        self._struck = False

    def strikes(self, steps: int) -> bool:
        """Whether it is time, of which this is then the only one."""
        if not self.mine or self._struck or steps < int(self.after):
            return False
        if "FAULT_MARKS" in os.environ:
            marks = Path(os.environ["FAULT_MARKS"])
            own = marks / f"{self.number}.{placement().rank}"
            if own.exists() or (self.number and not list(marks.glob(f"{self.number - 1}.*"))):
                return False
            own.touch()
        self._struck = True
        return True

    def plant(self, owner: Any, name: str, steps: Any, before: bool = True) -> None:
        whole = getattr(owner, name)

        def broken(*arguments: Any, **options: Any) -> Any:
            strikes = self.strikes(steps(*arguments))
            if strikes and before:
                ACTIONS[self.action]()
            result = whole(*arguments, **options)
            if strikes and not before:
                ACTIONS[self.action]()
            return result

        setattr(owner, name, broken)

    def plant_nan(self) -> None:
        whole = Learner._fed

        def broken(learner: Learner, *arguments: Any) -> Any:
            feeds = whole(learner, *arguments)
            if self.mine and arguments[-1] == int(self.after):  # the step that they are for
                feeds[0]["data"] = feeds[0]["data"] * (np.nan if self.action == "nan" else np.inf)
            return feeds

        Learner._fed = broken  # type: ignore[method-assign]

    def plant_at_point(self) -> None:
        point = self.point
        if self.action == "alarm":  # kills as surely as SIGKILL, by the kernel's clock, whatever the process is doing
            ACTIONS["alarm"] = lambda: signal.setitimer(signal.ITIMER_REAL, float(point))
            self.plant(train, "connect", lambda *_: 0)
        elif self.action in ("nan", "inf"):
            self.plant_nan()
        elif point == "start":
            self.plant(train, "connect", lambda *_: 0)
        elif point == "resume":
            self.plant(Checkpoints, "resume", lambda *_: 0)
        elif point == "step":
            self.plant(Learner, "step", lambda learner, *_: learner.steps)
        elif point == "allreduce":
            self.plant(Learner, "_reduce", lambda learner, *_: learner.steps)  # the others wait in it
        elif point == "save":
            self.plant(RunState, "state_dict", lambda state: state.learner.steps)
        elif point == "write":
            self.plant(store, "_write", lambda file, _: written_step(file, "checkpoints"))
        elif point == "commit":
            self.plant(store, "_write", lambda file, _: written_step(file, "horovod-gluon-job."))
        elif point == "evaluation":
            self.plant(Learner, "evaluate", lambda learner, *_: learner.steps)


def written_step(file: Path, folder: str) -> int:
    """The step of the checkpoint whose last file is about to be written into a folder of such a name; else none."""
    last = file.name == store.MANIFEST and file.parent.parent.name.startswith(folder)
    return int(file.parent.name.partition(".")[0][5:]) if last else -1


for number, text in enumerate(os.environ.get("FAULT", "none:none:0:0").split()):
    Fault(number, text).plant_at_point()


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
    wait_for_rank(prepare=train.load_loops)
    command.run(timed if os.environ.get("FAULT", "").startswith("time:") else train.main)
