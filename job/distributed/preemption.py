"""Asked to stop: SIGTERM or SIGUSR1 to any rank ends the run after a step, with a checkpoint, on all ranks together."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from types import TracebackType
from typing import Optional

from job.distributed.comm import Comm
from job.errors import Preempted

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_ECHO_SECONDS = 1.0  # launchers and process groups deliver one signal twice


class Preemption:
    """Hears the signals while its block runs, in the main thread. A second one ends the process at once.

    A thread of its own listens, for Python runs handlers only between the steps of its main thread, which may wait
    inside MXNet for ever.
    """

    def __init__(self) -> None:
        self.signal = ""  # the first that came, by name

    def __enter__(self) -> Preemption:
        self._hears = threading.current_thread() is threading.main_thread()
        if not self._hears:  # as in a notebook: only the main thread may say what a signal does
            print("warning: not in the main thread, so no signal stops this run with a checkpoint", file=sys.stderr)
            return self
        self._previous = {number: signal.signal(number, _ignore) for number in SIGNALS}
        self._reader, writer = os.pipe()
        os.set_blocking(writer, False)
        self._writer = writer
        self._previous_wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, name="preemption", daemon=True).start()
        return self

    def __exit__(
        self, kind: Optional[type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        if not self._hears:
            return
        signal.set_wakeup_fd(self._previous_wakeup)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        os.close(self._writer)  # which ends the thread

    def preempted(self, comm: Comm, step: int) -> Preempted:
        """What to raise after ``step`` steps, on all ranks together; it names the ranks that were asked."""
        signals = comm.gather_text(self.signal, "preemption")
        asked = ", ".join(f"rank {rank} received {name}" for rank, name in enumerate(signals) if name)
        return Preempted(f"stopped after step {step}, because {asked}; the same command goes on from there")

    def _listen(self) -> None:
        heard = 0.0
        while number := os.read(self._reader, 1):
            if number[0] not in SIGNALS or (heard and time.monotonic() < heard + _ECHO_SECONDS):
                continue
            name = signal.Signals(number[0]).name
            if heard:
                print(f"error: {name} for the second time: ending at once", file=sys.stderr, flush=True)
                os._exit(128 + number[0])
            heard, self.signal = time.monotonic(), name
        os.close(self._reader)


def _ignore(number: int, frame: object) -> None:
    """The listening thread has heard it."""
