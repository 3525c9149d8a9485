"""The ranks of one attempt on this machine: started together, watched as their parent, and ended at once."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Optional

from horovod.runner.gloo_run import create_slot_env_vars
from horovod.runner.http.http_server import RendezvousHandler, RendezvousHTTPServer

from job.distributed.standby import STANDBY
from job.errors import JobError
from launch.rank import meeting_environment, slot

STUCK = 256  # in place of an exit code, of a rank that should have ended and has not
_LOOPBACK = "127.0.0.1"
_GONE_SECONDS = 30.0  # for a process to vanish after SIGKILL


class Ended(NamedTuple):
    """A rank that has ended by itself. A negative code is the signal that ended it."""

    rank: int
    code: int

    def __str__(self) -> str:
        if self.code == STUCK:
            return f"rank {self.rank} did not end with the others"
        if self.code < 0:
            return f"rank {self.rank} was ended by {signal.Signals(-self.code).name}"
        return f"rank {self.rank} ended with exit code {self.code}"


class Crew:
    """Processes that have imported everything and wait to become the ranks of a gang: see job/distributed/standby.py.

    Args:
        command: of a rank.
        size: how many.
    """

    def __init__(self, command: Sequence[str], size: int) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []
        for rank in range(size):
            own = {**create_slot_env_vars(slot([size], 0, rank, rank)), STANDBY: "yes"}
            self._processes.append(_popen(command, own, subprocess.PIPE))
        self._waiting = list(self._processes)

    def become(self, rank: int, variables: Mapping[str, str]) -> Optional[subprocess.Popen[bytes]]:
        """The process of ``rank``, which trains now; None if it has died waiting."""
        process = self._processes[rank]
        assert process.stdin is not None
        try:
            with process.stdin as pipe:
                pipe.write(json.dumps(variables).encode() + b"\n")
        except OSError:
            return None
        self._waiting.remove(process)
        return process

    def dismiss(self) -> None:
        """Nobody needs those that still wait."""
        for process in self._waiting:
            process.kill()
        for process in self._waiting:
            process.wait()


class Gang:
    """Some ranks that are started together.

    Each is a session of its own: what a terminal sends reaches it through here alone. If this process dies, the kernel
    sends each SIGTERM, and they stop with a checkpoint.

    Args:
        command: of a rank.
        size: how many ranks.
        variables: added to the environment.
        crew: of as many or more, to take instead of new processes. None if there is none.
    """

    def __init__(
        self, command: Sequence[str], size: int, variables: Mapping[str, str], crew: Optional[Crew] = None
    ) -> None:
        self.size = size
        self._codes: dict[int, int] = {}
        self._processes: list[subprocess.Popen[bytes]] = []
        self._server = _Server((_LOOPBACK, 0), RendezvousHandler, verbose=0)
        self._server.init([slot([size], 0, rank, rank) for rank in range(size)])
        threading.Thread(target=self._server.serve_forever, args=(0.05,), name="rendezvous", daemon=True).start()
        together = {**meeting_environment(_LOOPBACK, self._server.server_address[1]), **variables}
        try:
            for rank in range(size):
                own = {**together, **create_slot_env_vars(slot([size], 0, rank, rank))}
                waiting = crew.become(rank, own) if crew else None
                self._processes.append(waiting or _popen(command, own, subprocess.DEVNULL))
        except OSError as error:
            self.end()
            raise JobError(f"cannot start rank {len(self._processes)}: {error.strerror}") from None

    def ended(self) -> list[Ended]:
        """Those that have ended since the last call."""
        now = []
        for rank, process in enumerate(self._processes):
            if rank not in self._codes and process.poll() is not None:
                self._codes[rank] = process.returncode
                now.append(Ended(rank, process.returncode))
        return now

    @property
    def over(self) -> bool:
        """Whether all have ended."""
        return len(self._codes) == self.size

    def signal(self, number: int) -> None:
        """Send a signal to all that still run."""
        for process in self._processes:
            process.send_signal(number)

    def end(self) -> None:
        """Kill what is left, and all that it has started. Nothing runs any more afterwards.

        Raises:
            JobError: a process cannot be killed: it hangs within the kernel.
        """
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
        self._server.shutdown()
        self._server.server_close()
        deadline = time.monotonic() + _GONE_SECONDS
        for rank, process in enumerate(self._processes):
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise JobError(
                    f"rank {rank} (process {process.pid}) cannot be killed: it hangs within the kernel, in a driver or"
                    " a file system; nothing was started again beside it"
                ) from None


class _Server(RendezvousHTTPServer):
    """Horovod's rendezvous server, for this machine alone: it unpickles what it is sent."""

    daemon_threads = True


def _popen(command: Sequence[str], variables: Mapping[str, str], stdin: int) -> subprocess.Popen[bytes]:
    follow = ["setpriv", "--pdeathsig", "TERM", "--"] if shutil.which("setpriv") else []
    environment = {**os.environ, **variables}
    return subprocess.Popen([*follow, *command], env=environment, stdin=stdin, start_new_session=True)
