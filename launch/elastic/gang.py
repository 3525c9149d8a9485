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
from typing import Optional

from horovod.runner.common.util.hosts import SlotInfo
from horovod.runner.gloo_run import create_slot_env_vars
from horovod.runner.http.http_server import RendezvousHandler, RendezvousHTTPServer

from job.distributed.standby import STANDBY
from job.errors import JobError
from launch.elastic.places import Place
from launch.elastic.supervisor import Ended
from launch.rank import meeting_environment, slot

_LOOPBACK = "127.0.0.1"
_GONE_SECONDS = 30.0  # for a process to vanish after SIGKILL


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
            self._processes.append(popen(command, own, subprocess.PIPE))
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


class LocalGang:
    """Some ranks that are started together: a :class:`launch.elastic.supervisor.Gang`.

    Each is a session of its own: what a terminal sends reaches it through here alone. If this process dies, the kernel
    sends each SIGTERM, and they stop with a checkpoint.

    Args:
        command: of a rank.
        places: of the ranks.
        variables: added to the environment.
        crew: of as many or more, to take instead of new processes. None if there is none.
    """

    def __init__(
        self, command: Sequence[str], places: Sequence[Place], variables: Mapping[str, str], crew: Optional[Crew] = None
    ) -> None:
        self.places, size = places, len(places)
        self._codes: dict[int, int] = {}
        self._processes: list[subprocess.Popen[bytes]] = []
        self._server = Rendezvous(_LOOPBACK, [slot([size], 0, rank, rank) for rank in range(size)])
        together = {**meeting_environment(_LOOPBACK, self._server.port), **variables}
        try:
            for rank in range(size):
                own = {**together, **create_slot_env_vars(slot([size], 0, rank, rank))}
                waiting = crew.become(rank, own) if crew else None
                self._processes.append(waiting or popen(command, own, subprocess.DEVNULL))
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
        return len(self._codes) == len(self.places)

    def signal(self, number: int) -> None:
        """Send a signal to all that still run."""
        for process in self._processes:
            process.send_signal(number)

    def end(self) -> list[Ended]:
        """Kill what is left, and all that it has started. Nothing runs any more afterwards.

        Returns nothing: this machine was not lost.

        Raises:
            JobError: a process cannot be killed: it hangs within the kernel.
        """
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
        self._server.stop()
        deadline = time.monotonic() + _GONE_SECONDS
        for rank, process in enumerate(self._processes):
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise JobError(
                    f"rank {rank} (process {process.pid}) cannot be killed: it hangs within the kernel, in a driver or"
                    " a file system; nothing was started again beside it"
                ) from None
        return []


class Rendezvous(RendezvousHTTPServer):
    """Horovod's rendezvous server for one gang. It unpickles what it is sent: only ranks may reach ``address``."""

    daemon_threads = True

    def __init__(self, address: str, slots: Sequence[SlotInfo]) -> None:
        super().__init__((address, 0), RendezvousHandler, verbose=0)
        self.port: int = self.server_address[1]
        self.init(slots)
        threading.Thread(target=self.serve_forever, args=(0.05,), name="rendezvous", daemon=True).start()

    def stop(self) -> None:
        """Free the port."""
        self.shutdown()
        self.server_close()


def popen(command: Sequence[str], variables: Mapping[str, str], stdin: int) -> subprocess.Popen[bytes]:
    """Start a rank, with ``variables`` added to the environment. It is asked to stop if this process dies."""
    follow = ["setpriv", "--pdeathsig", "TERM", "--"] if shutil.which("setpriv") else []
    environment = {**os.environ, **variables}
    return subprocess.Popen([*follow, *command], env=environment, stdin=stdin, start_new_session=True)
