"""Who is late? Asked of every rank beside the collectives, which are what hangs when one is."""

from __future__ import annotations

import faulthandler
import os
import select
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence

_ANSWER_SECONDS = 2.0
_LINGER_SECONDS = 2.0
_QUESTION = b"where are you?"


class RollCall:
    """Answers how many collectives this rank has entered, and asks the others. The late one has entered fewest.

    A thread of its own answers, also while the main thread sleeps or waits. Whoever is asked shows its stacks, so that
    they are in the log of every rank that is not stopped.

    Args:
        rank: of this process.
        entered: how many collectives it has entered.
    """

    def __init__(self, rank: int, entered: Callable[[], int]) -> None:
        self._rank = rank
        self._entered = entered
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind((_own_address(), 0))
        self.peers: Sequence[tuple[str, int]] = ()  # the addresses of all ranks, in their order
        threading.Thread(target=self._answer, name="roll call", daemon=True).start()

    @property
    def address(self) -> tuple[str, int]:
        """Where this rank can be asked: IPv4 address and UDP port."""
        host, port = self._socket.getsockname()
        return host, port

    def late(self) -> str:
        """Which ranks the others wait for, in words. Empty as long as ``peers`` is."""
        counts = self._ask()
        silent = [rank for rank in range(len(self.peers)) if rank not in counts]
        if silent and len(silent) == len(self.peers) - 1 > 1:
            return "none of the other ranks answers: this one may be cut off"
        if silent:
            return f"late: {_ranks(silent)}, silent: stopped, dead or cut off"
        behind = [rank for rank, count in counts.items() if count < max(counts.values())]
        if behind:
            return f"late: {_ranks(behind)}, alive, but behind the others; the stacks in its log say where"
        return ""

    def linger(self) -> None:
        """Stay a little, so that others who ask now are not told that this rank is silent."""
        time.sleep(_ANSWER_SECONDS + _LINGER_SECONDS)

    def _ask(self) -> dict[int, int]:
        counts = {self._rank: self._entered()} if self.peers else {}
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
            end = time.monotonic() + _ANSWER_SECONDS
            while len(counts) < len(self.peers) and time.monotonic() < end:
                for rank, peer in enumerate(self.peers):
                    if rank not in counts:
                        asking.sendto(_QUESTION, peer)
                while select.select([asking], [], [], 0.2)[0]:
                    answer = asking.recvfrom(64)[0].split()
                    counts[int(answer[0])] = int(answer[1])
        return dict(sorted(counts.items()))

    def _answer(self) -> None:
        shown = False
        while True:
            question, asker = self._socket.recvfrom(64)
            if question != _QUESTION:
                continue
            self._socket.sendto(f"{self._rank} {self._entered()}".encode(), asker)
            if not shown:
                shown = True
                print(f"rank {self._rank}: another rank waits too long; here are", file=sys.stderr, flush=True)
                faulthandler.dump_traceback(file=sys.stderr)


def _own_address() -> str:
    """The address by which the other ranks reach this one: that of the interface towards the launcher."""
    launcher = os.environ.get("HOROVOD_GLOO_RENDEZVOUS_ADDR") or socket.gethostname()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((launcher, 9))  # sends nothing
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
