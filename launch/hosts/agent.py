"""Run on each host by launch/cluster.py, over ssh: starts the ranks there, passes on what they print, and ends them.

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

What the agent writes is one JSON object a line: ``{"rank", "stream", "text"}``, ``{"rank", "code"}``, or ``{"error"}``
if a rank cannot be started.

It needs nothing but Python, so that it starts at once. Should it be killed itself, the ranks find their output unread
and end (job/distributed/watchdog.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
from typing import IO, Any

_LISTEN_SECONDS = 1.0
_DRAIN_SECONDS = 5.0  # for the output of a rank that has ended, should a process that it left hold the pipe


class Agent:
    """The ranks of this host."""

    def __init__(self, words: IO[bytes]) -> None:
        self._words = words
        self._plan: dict[str, Any] = json.loads(words.readline() or b"{}")
        self._writing = threading.Lock()
        self._ranks: list[subprocess.Popen[bytes]] = []

    def run(self) -> None:
        """Start the ranks and wait until all of them have ended."""
        environment = {**os.environ, **self._plan["environment"]}
        environment["PATH"] = f"{os.path.dirname(sys.executable)}{os.pathsep}{environment.get('PATH', os.defpath)}"
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: self.signal(signal.SIGTERM))
        for variables in self._plan["ranks"]:
            self._ranks.append(self._start({**environment, **variables}))
        waits = [
            threading.Thread(target=self._wait, args=(variables["HOROVOD_RANK"], rank), daemon=True)
            for variables, rank in zip(self._plan["ranks"], self._ranks)
        ]
        threading.Thread(target=self._listen, daemon=True).start()
        for thread in waits:
            thread.start()
        for thread in waits:
            thread.join()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to all ranks that still run."""
        for rank in self._ranks:
            if rank.returncode is None:
                _signal_group(rank, number)

    def say(self, **message: Any) -> None:
        """Tell the launcher, if it is still there."""
        with self._writing, contextlib.suppress(OSError):
            print(json.dumps(message), flush=True)

    def _start(self, environment: dict[str, str]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            self._plan["command"],
            cwd=self._plan["directory"],
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
            if line.strip() in signals:
                self.signal(signals[line.strip()])
        self.signal(signal.SIGTERM)
        threading.Timer(self._plan["grace_seconds"], self.signal, [signal.SIGKILL]).start()

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
        return False


def _signal_group(rank: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(rank.pid, number)


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
