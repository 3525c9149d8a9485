#!/usr/bin/env python
"""Run by job/train.py in its own place, where ``horovodrun --min-np`` has started that: stays while ranks come and go.

Horovod's elastic driver (``horovod.runner.elastic``) starts one process for each slot. It expects that process to stay
when another one dies and when hosts join or leave, to ask for its next rank then, and to go on with it. A host on which
such a process fails is not used again.

Here a rank that has lost another is not used again. So what the driver sees is this process, and the rank is its child,
which goes on from a commit in memory when it is started anew (docs/elastic.md). The driver is told what Horovod's own
workers tell it, and nothing of it is changed.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[0] = str(ROOT)

import yaml
from horovod.runner.common.util.hosts import SlotInfo
from horovod.runner.elastic.rendezvous import GET_RANK_AND_SIZE
from horovod.runner.elastic.worker import WorkerNotificationManager
from horovod.runner.gloo_run import create_slot_env_vars

from job import command
from job.checkpoints import commits
from job.config import Config
from job.errors import CheckpointError, JobError, Preempted, UsageError
from launch.elastic.gang import popen
from launch.elastic.memory import memory
from launch.elastic.supervisor import GO_ON, Change, plan
from launch.shared.arguments import with_auto_resume

TRAIN = [sys.executable, str(ROOT / "job" / "train.py")]
_POLL_SECONDS = 0.05
_MOST_IN_VAIN = 5  # failures in a row, none of which came a step further; nobody here knows which rank was the first
_WELL = (0, Preempted.exit_code)


class Worker:
    """One slot of a host, from the driver's start of it until the job ends, or the slot is taken away.

    Args:
        train: the command of a rank, with all arguments that last.
        begin: arguments for the ranks with which the run begins.
        config: of the run.
        memory: the folder for the commits, which the first slot of each host writes.
    """

    def __init__(self, train: Sequence[str], begin: Sequence[str], config: Config, memory: Path) -> None:
        self._train = train
        # A worker that joins must never replace what others have done.
        self._begin = begin if os.environ["HOROVOD_RANK"] == "0" else GO_ON
        self._config = config
        self._memory = memory
        self._host, self._local_rank = os.environ["HOROVOD_HOSTNAME"], int(os.environ["HOROVOD_LOCAL_RANK"])
        self._rank: Optional[subprocess.Popen[bytes]] = None  # the process that trains
        self._stopped = False  # by the driver, or the user
        self._hosts_changed = False
        self._steps = self._farthest = self._in_vain = 0  # that the run has taken, and had before the last failure
        self._change: Optional[Change] = None  # from the end of a rank to the first step of the next

    def run(self) -> int:
        """Train as the driver has it, again and again. Returns the exit code of the contract."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(number, self._stop)
        notifications = WorkerNotificationManager()
        notifications.register_listener(self)
        notifications.init()
        places = ("RANK", "LOCAL_RANK", "CROSS_RANK", "SIZE", "LOCAL_SIZE", "CROSS_SIZE")
        slot = SlotInfo(self._host, *(int(os.environ[f"HOROVOD_{place}"]) for place in places))
        code = 0
        try:
            while slot.rank >= 0:
                code = self._attempt(slot)
                if code == 0 or self._stopped or self._gives_up(code):
                    return code if code in (*_WELL, UsageError.exit_code) else 1
                slot = self._next_slot()
            return 0
        finally:
            if code not in _WELL and self._local_rank == 0:
                self._save()

    def on_hosts_updated(self, timestamp: int, change: Any) -> None:
        """Called by Horovod, in a thread of its own, and for the worker of rank 0 alone."""
        self._hosts_changed = True

    def _stop(self, number: int, frame: object) -> None:
        self._stopped = True
        if not self._rank:
            raise Preempted("stopped while no rank ran")
        self._rank.send_signal(signal.SIGTERM)

    # --- one attempt -------------------------------------------------------------------------------------------------

    def _attempt(self, slot: SlotInfo) -> int:
        """Run one rank to its end. Returns its exit code."""
        if slot.size > self._config.data.shards:
            raise UsageError(
                f"{slot.size} ranks need data.shards={slot.size} or more, from the start: as --max-np says"
            )
        commits.forget_progress(self._memory)
        variables = {**create_slot_env_vars(slot), commits.FOLDER: str(self._memory)}
        self._rank = popen([*self._train, *self._begin], variables, subprocess.DEVNULL)
        asked = False
        while self._rank.poll() is None:
            time.sleep(_POLL_SECONDS)
            if self._trains(slot) and self._hosts_changed and not asked:
                asked = True
                self._rank.send_signal(signal.SIGTERM)  # all ranks stop after their step, with a checkpoint
        self._trains(slot)
        code, pid, self._rank = self._rank.returncode, self._rank.pid, None
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)  # what it may have left behind
        if not self._change:
            why = "hosts joined or left" if code == Preempted.exit_code else "a rank failed"
            self._change = Change(why, slot.size, self._steps, time.monotonic())
        return code

    def _trains(self, slot: SlotInfo) -> bool:
        """Whether the ranks of this attempt have taken a step, as the first slot of each host comes to know."""
        progress = commits.progress(self._memory)
        if progress:
            self._begin = GO_ON
        if not progress or progress.steps <= progress.went_on:
            return False
        self._steps = progress.steps
        change, self._change = self._change, None
        if change and slot.rank == 0:
            _say(change.note(self._config.run.dir, slot.size, progress.went_on))
        return True

    def _gives_up(self, code: int) -> bool:
        """Whether another attempt would not come further. The first slot of a host decides for it."""
        if code == Preempted.exit_code or (self._local_rank and code != UsageError.exit_code):
            return False
        self._in_vain = 0 if self._steps > self._farthest else self._in_vain + 1
        self._farthest = max(self._farthest, self._steps)
        return code == UsageError.exit_code or self._in_vain >= _MOST_IN_VAIN

    # --- between two -------------------------------------------------------------------------------------------------

    def _next_slot(self) -> SlotInfo:
        """Say that this slot is ready, and wait for its next rank, which is -1 if it is not needed any more.

        Raises:
            JobError: the driver does not answer.
        """
        self._hosts_changed = False
        server = f"{os.environ['HOROVOD_GLOO_RENDEZVOUS_ADDR']}:{os.environ['HOROVOD_GLOO_RENDEZVOUS_PORT']}"
        url = f"http://{server}/{GET_RANK_AND_SIZE}/{self._host}:{self._local_rank}"
        # The others come when their ranks have ended. Then the driver may have to wait for more hosts.
        patience_seconds = self._config.run.step_timeout_seconds + self._config.elastic.timeout_seconds
        try:
            with urllib.request.urlopen(url, timeout=patience_seconds) as answer:
                rank, size, local_rank, local_size, cross_rank, cross_size = map(int, answer.read().split(b","))
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise JobError(f"horovodrun does not say how to go on: {error}") from None
        return SlotInfo(self._host, rank, local_rank, cross_rank, size, local_size, cross_size)

    def _save(self) -> None:
        """Bring the last commit to the disk, unless others go on."""
        try:
            commits.rescue(self._memory, self._config.run.dir)
        except CheckpointError as error:
            _say(str(error))


def _say(message: str) -> None:
    with contextlib.suppress(OSError):  # whoever read it may be gone
        print(f"horovodrun: {message}", file=sys.stderr, flush=True)


def main(arguments: Sequence[str], train: Sequence[str] = TRAIN) -> int:
    """Check the configuration, and keep this slot going. Returns the exit code."""
    del os.environ["HOROVOD_ELASTIC"]  # a rank that had it would ask for its next rank by itself
    os.environ.pop("JOB_PREEMPTED_FILE", None)  # of a launch script around horovodrun, which is not told so
    direct = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    os.environ["no_proxy"] = f"{direct},{os.environ['HOROVOD_GLOO_RENDEZVOUS_ADDR']}"  # the driver is no web server
    arguments = with_auto_resume(arguments)
    checked = subprocess.run([*train, "--check", *arguments], stdout=subprocess.PIPE, text=True)
    if checked.returncode:
        return checked.returncode if checked.returncode == UsageError.exit_code else 1
    config = Config.model_validate(yaml.safe_load(checked.stdout))
    begin, lasting = plan(arguments, config, most=config.data.shards)
    with memory() as folder:
        return Worker([*train, *lasting], begin, config, folder).run()


if __name__ == "__main__":
    command.run(lambda: main(sys.argv[1:]))
