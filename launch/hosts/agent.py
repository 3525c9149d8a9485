"""Run on each host by launch/cluster.py, over ssh or srun: starts the ranks there, passes on their output, ends them.

    ssh HOST python launch/hosts/agent.py        (what follows comes over its standard input)

The first line is the plan, a JSON object:

    directory     where the ranks run
    command       what a rank runs
    environment   variables of all ranks; they come this way so that no command line shows them
    ranks         one object of further variables a rank
    silence_seconds  without a word, after which the launcher is taken for dead
    grace_seconds    that the ranks may then take to write a checkpoint

Each later line is a word: ``term`` and ``kill`` send that signal to the ranks, ``here`` is a sign of life. Silence, or
the end of the input, means that the launcher is gone: the ranks are asked to stop, and killed after the grace.

A plan with ``stay`` is of a job that goes on when ranks die (launch/hosts/ground.py). Then the agent keeps a folder for
commits in memory, and stays when the ranks have ended. A later line that is a JSON object holds the ``command``,
``environment`` and ``ranks`` of the next start. ``look`` asks for the newest commit and the newest checkpoint in
``run_dir``; ``save`` makes a checkpoint of that commit. SIGTERM to the agent means that this host is to leave. Where
the launcher is gone before it could ask, the agent saves the commit by itself, if it is newer than the checkpoints. If
the launcher fell silent, it then runs the command ``orphaned`` of the plan, where there is one.

What the agent writes is one JSON object a line: ``{"rank", "stream", "text"}``, ``{"rank", "code"}``, or ``{"error"}``
if a rank cannot be started, and ``{"here"}``, a sign of life. If it stays, also ``{"progress": [went on, steps]}`` when
that changes, ``{"ended"}`` when all ranks of a start have, ``{"leaving"}``, and the answers
``{"commit", "checkpoint"}`` (steps, or -1) and ``{"saved"}`` (what went wrong).

It needs nothing but Python, so that it starts at once. Should it be killed itself, the ranks find their output unread
and end (job/distributed/watchdog.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any, Optional

sys.path[0] = str(Path(__file__).resolve().parents[2])

from launch.elastic.memory import memory

_BEATS = 6  # signs of life in ``silence_seconds``; the launcher counts them
_LISTEN_SECONDS = 1.0
_PROGRESS_SECONDS = 0.05
_CHECKPOINT = re.compile(r"step-(\d{8,})")
_ORPHANED_SECONDS = 60.0
_DRAIN_SECONDS = 5.0  # for the output of a rank that has ended, should a process that it left hold the pipe


class Agent:
    """The ranks of this host."""

    def __init__(self, words: IO[bytes]) -> None:
        self._words = words
        self._plan: dict[str, Any] = json.loads(words.readline() or b"{}")
        self._writing = threading.Lock()
        self._ranks: list[subprocess.Popen[bytes]] = []
        self._asked: Optional[signal.Signals] = None  # of the ranks of this start
        self._memory: Optional[Path] = None  # for commits; None if the agent does not stay
        self._silence = False  # of the launcher, whose host may be lost
        self._starts: queue.SimpleQueue[Optional[dict[str, Any]]] = queue.SimpleQueue()  # None: no more will come

    def run(self) -> None:
        """Start the ranks and wait until all of them have ended; if the plan says to stay, again and again."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: self._asked_to_stop())
        beat_seconds = self._plan["silence_seconds"] / _BEATS
        threading.Thread(target=self._beat, args=[beat_seconds], daemon=True).start()
        if "stay" in self._plan:
            with memory() as self._memory:
                threading.Thread(target=self._listen, daemon=True).start()
                while start := self._starts.get():
                    self._train({**self._plan, **start})
                self._rescue()
                if self._silence and self._plan.get("orphaned"):
                    subprocess.run(
                        self._plan["orphaned"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                        stderr=subprocess.DEVNULL, timeout=_ORPHANED_SECONDS,
                    )  # fmt: skip
        else:
            self._train(self._plan)

    def _train(self, plan: dict[str, Any]) -> None:
        environment = {**os.environ, **plan["environment"]}
        environment["PATH"] = f"{os.path.dirname(sys.executable)}{os.pathsep}{environment.get('PATH', os.defpath)}"
        if self._memory:
            (self._memory / "progress").unlink(missing_ok=True)
            environment["JOB_COMMITS"] = str(self._memory)
        self._ranks = []
        for variables in plan["ranks"]:
            self._ranks.append(self._start(plan, {**environment, **variables}))
        if self._asked:
            self.signal(self._asked)
        waits = [
            threading.Thread(target=self._wait, args=(variables["HOROVOD_RANK"], rank), daemon=True)
            for variables, rank in zip(plan["ranks"], self._ranks)
        ]
        if not self._memory:
            threading.Thread(target=self._listen, daemon=True).start()
        for thread in waits:
            thread.start()
        for thread in waits:
            self._tell_progress_until_over(thread)
        if self._memory:
            self.say(ended=True)

    def _beat(self, seconds: float) -> None:
        while True:
            time.sleep(seconds)
            self.say(here=True)

    def _tell_progress_until_over(self, rank: threading.Thread) -> None:
        told = None
        while self._memory and rank.is_alive():
            rank.join(_PROGRESS_SECONDS)
            with contextlib.suppress(OSError, ValueError):
                went_on, steps = map(int, (self._memory / "progress").read_text().split())
                if (went_on, steps) != told:
                    told = went_on, steps
                    self.say(progress=told)
        rank.join()

    def _asked_to_stop(self) -> None:
        if self._memory:
            self.say(leaving=True)  # all ranks of the job stop together, when the launcher asks them to
        else:
            self.signal(signal.SIGTERM)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to all ranks that still run, and to those that are just being started."""
        self._asked = number
        for rank in list(self._ranks):
            if rank.returncode is None:
                _signal_group(rank, number)

    def say(self, **message: Any) -> None:
        """Tell the launcher, if it is still there."""
        with self._writing, contextlib.suppress(OSError):
            print(json.dumps(message), flush=True)

    def _start(self, plan: dict[str, Any], environment: dict[str, str]) -> subprocess.Popen[bytes]:
        # Where others would go on, a rank must not outlive the agent that could end it.
        follow = ["setpriv", "--pdeathsig", "KILL", "--"] if self._memory and shutil.which("setpriv") else []
        return subprocess.Popen(
            [*follow, *plan["command"]],
            cwd=plan["directory"],
            env={**environment, "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # signals reach it through here alone, and with it all that it starts
        )

    def _wait(self, name: str, rank: subprocess.Popen[bytes]) -> None:
        pumps = [
            threading.Thread(target=self._pump, args=(name, stream, pipe), daemon=True)
            for stream, pipe in (("stdout", rank.stdout), ("stderr", rank.stderr))
        ]
        for pump in pumps:
            pump.start()
        code = rank.wait()
        _signal_group(rank, signal.SIGKILL)  # what it may have left behind
        for pump in pumps:
            pump.join(_DRAIN_SECONDS)
        self.say(rank=int(name), code=code)

    def _pump(self, name: str, stream: str, pipe: IO[bytes]) -> None:
        for line in pipe:
            self.say(rank=int(name), stream=stream, text=line.decode(errors="replace").rstrip("\r\n"))

    def _listen(self) -> None:
        signals = {b"term": signal.SIGTERM, b"kill": signal.SIGKILL}
        while self._hears() and (line := self._words.readline()):
            word = line.strip()
            if word in signals:
                self.signal(signals[word])
            elif word.startswith(b"{"):
                self._asked = None
                self._starts.put(json.loads(word))
            elif word == b"look":
                self._look()
            elif word == b"save":
                self._save()
        self._starts.put(None)
        self.signal(signal.SIGTERM)
        threading.Timer(self._plan["grace_seconds"], self.signal, [signal.SIGKILL]).start()

    def _look(self) -> None:
        commit = _newest(self._memory) if self._memory else -1
        self.say(commit=commit, checkpoint=_newest(self._run_dir / "checkpoints"))

    def _save(self) -> None:
        from job.checkpoints.commits import TAKEOVER_SECONDS, rescue
        from job.errors import JobError

        assert self._memory
        try:
            rescue(self._memory, self._run_dir, TAKEOVER_SECONDS)
            self.say(saved="")
        except JobError as error:
            self.say(saved=str(error))

    def _rescue(self) -> None:
        """Save the last commit, if whoever should have asked for that is gone. No rank of this host runs any more."""
        assert self._memory
        if _newest(self._memory) > _newest(self._run_dir / "checkpoints") >= 0:
            from job.checkpoints.commits import rescue
            from job.errors import JobError

            with contextlib.suppress(JobError):
                rescue(self._memory, self._run_dir)

    @property
    def _run_dir(self) -> Path:
        return Path(self._plan["directory"], self._plan["run_dir"])

    def _hears(self) -> bool:
        """Wait for a word. Silence is counted in short waits, not by the clock: while this host was itself paused, the
        words of a launcher that was paused with it could not come.
        """
        left = self._plan["silence_seconds"]
        while left > 0:
            wait = min(_LISTEN_SECONDS, left)
            if select.select([self._words], [], [], wait)[0]:
                return True
            left -= wait
        self._silence = True
        return False


def _signal_group(rank: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(rank.pid, number)


def _newest(folder: Path) -> int:
    """After how many steps the newest of the checkpoints was written; -1 if there is none."""
    try:
        found = [_CHECKPOINT.fullmatch(name) for name in os.listdir(folder)]
    except OSError:
        return -1
    return max((int(name[1]) for name in found if name), default=-1)


def main() -> None:
    """Read the plan and carry it out."""
    agent = Agent(os.fdopen(0, "rb", buffering=0))  # without a buffer, for select sees none
    try:
        agent.run()
    except (OSError, KeyError) as error:
        agent.say(error=f"cannot start a rank: {error}")
        agent.signal(signal.SIGKILL)
    os._exit(0)  # the listening thread waits for ever


if __name__ == "__main__":
    main()
