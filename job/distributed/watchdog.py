"""A bound on every wait for another rank."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import select
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Optional

_POLL_SECONDS = 0.5
_CALM_SECONDS = 2.0  # for which nobody asks why a wait takes so long; horovodrun kills all 5 s after one has failed
_PAUSE_SECONDS = 2.0  # a look that comes so much too late tells that this process was itself stopped
leaving = threading.Lock()  # taken, and never released, by the thread that decides how the process ends


def tell(message: str, stacks: bool = True) -> None:
    """Print an error, if there is one, and where every thread stands; though nobody may read it any more."""
    with contextlib.suppress(OSError, ValueError):
        if message:
            print(f"error: {message}", file=sys.stderr, flush=True)
        if stacks:
            faulthandler.dump_traceback(file=sys.stderr)


def end_process(message: str) -> None:
    """Say why, show where every thread stands, and leave: a rank that waits inside MXNet cannot be woken."""
    leaving.acquire()  # nobody ends with 0 while this is being said
    tell(message)
    os._exit(1)


def is_orphan() -> bool:
    """Whether the launcher that reads this process's output has died. Remote ranks would go on for ever."""
    poll = select.poll()
    poll.register(1, 0)  # errors are always reported
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))


class Watchdog:
    """Calls ``on_expiry`` with a message when something guarded is late.

    Ends the process when it is an orphan, and when something guarded takes some seconds and ``gone`` says, in words,
    that other ranks have ended. Nothing else would end a GPU's wait for them; nor a sum inside an MXNet operator that
    Horovod refuses because it has stopped: MXNet hands on no error there but its own kind.

    One daemon thread looks at all guarded waits, so that guarding costs no more than two dictionary operations.

    Time for which the process was stopped (SIGSTOP, ``docker pause``, a batch system that suspends a job) counts for no
    wait: the other ranks were mostly stopped with it.
    """

    def __init__(
        self,
        limit_seconds: float,
        on_expiry: Callable[[str], None] = end_process,
        orphaned: Callable[[], bool] = lambda: False,
        gone: Callable[[], str] = lambda: "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limit_seconds = limit_seconds
        self._on_expiry = on_expiry
        self._orphaned = orphaned
        self._gone = gone
        self._clock = clock
        self._stopped_seconds = 0.0  # that this process has been, in all
        self._waits: dict[object, tuple[float, float, str]] = {}
        self._closed = threading.Event()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    @contextmanager
    def guard(self, what: str, limit_seconds: Optional[float] = None) -> Iterator[None]:
        """Bound the time that the block may take, by default to the watchdog's limit; ``what`` names the block."""
        key = object()
        limit = self.limit_seconds if limit_seconds is None else limit_seconds
        self._waits[key] = (self._now() + limit, limit, what)
        try:
            yield
        finally:
            del self._waits[key]

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()

    def _now(self) -> float:
        """The seconds that this process could run."""
        return self._clock() - self._stopped_seconds

    def _watch(self) -> None:
        interval, looked = min(_POLL_SECONDS, self.limit_seconds / 4), self._clock()
        while not self._closed.wait(interval):
            before, looked = looked, self._clock()
            late = looked - before - interval
            if late > _PAUSE_SECONDS:
                self._stopped_seconds += late
            if self._orphaned():
                end_process("the launcher has died")
            waits = list(self._waits.values())
            long = [what for deadline, limit, what in waits if self._now() > deadline - limit + _CALM_SECONDS]
            ended = self._gone() if long else ""
            if ended:
                end_process(f"{long[0]}: {ended}, and this rank would wait for ever")
            for deadline, limit, what in waits:
                if self._now() > deadline:
                    self._on_expiry(f"{what}: no answer within {limit:g} s")
                    return
