"""Who is late, and who is gone? Asked of every rank beside the collectives, which are what hangs when one is."""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import os
import select
import socket
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

_ANSWER_SECONDS = 2.0
_LINGER_SECONDS = 2.0
_QUESTION, _CALL = b"where are you?", b"are you there?"  # to the second one nobody shows stacks
_REFUSALS = 4  # one after the other: the first may be left from a question of long ago
_AT_ONCE = 10_000  # answers that are read by one call: a bound
_IP_RECVERR = 11  # of Linux, which Python does not name: see ip(7)


class RollCall:
    """Answers how many collectives this rank has entered, and asks the others. The late one has entered fewest.

    Where a process has ended, its machine refuses what is sent to its port. That ends a wait which nothing else would:
    a sum of NCCL that a rank has begun goes on for ever if another one dies, and Horovod does not abort it.

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
        self._caller = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._caller.setblocking(False)
        self._caller.setsockopt(socket.IPPROTO_IP, _IP_RECVERR, 1)  # and the kernel says who has refused
        self.all_stay = True  # whether no rank has a reason to end
        self._present: set[int] = set()  # ranks that have answered a call
        self._refused: Counter[int] = Counter()  # by rank, since its last answer
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

    def gone(self) -> str:
        """Which ranks have ended, in words, of those that have answered before. Empty as long as ``peers`` is.

        Never waits: a call reads what came of those before it. A rank that is stopped or cut off is not told of: it may
        come back, and a firewall may refuse what is sent to a rank that runs.
        """
        for rank in self._answers():
            self._present.add(rank)
            self._refused[rank] = 0
        self._refused.update(self._refusals())
        ranks = [rank for rank in sorted(self._present) if self._refused[rank] >= _REFUSALS]
        for rank, peer in enumerate(self.peers):
            if rank != self._rank:
                with contextlib.suppress(OSError):  # it tells of an earlier refusal, here or in a moment
                    self._caller.sendto(_CALL, peer)
        if not (ranks and self.all_stay):
            return ""
        return f"{_ranks(ranks)} {'have' if len(ranks) > 1 else 'has'} ended"

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

    def _answers(self) -> Iterator[int]:
        """The ranks that have answered a call."""
        for _, peer in self._received(lambda: self._caller.recvfrom(64)):
            if peer in self.peers:
                yield self.peers.index(peer)

    def _refusals(self) -> Iterator[int]:
        """The ranks whose machines have refused a call."""
        for _, reasons, _, peer in self._received(lambda: self._caller.recvmsg(64, 256, socket.MSG_ERRQUEUE)):
            codes = [struct.unpack_from("I", data)[0] for _, kind, data in reasons if kind == _IP_RECVERR]
            if codes == [errno.ECONNREFUSED] and peer in self.peers:  # others, as of a lost route, may pass
                yield self.peers.index(peer)

    def _received(self, receive: Callable[[], Any]) -> Iterator[Any]:
        """What has come. Errors of what was sent are raised once beside their place in the queue of errors."""
        for _ in range(_AT_ONCE):
            try:
                yield receive()
            except BlockingIOError:
                return
            except OSError:
                continue

    def _answer(self) -> None:
        shown = False
        while True:
            question, asker = self._socket.recvfrom(64)
            if question not in (_QUESTION, _CALL):
                continue
            with contextlib.suppress(OSError):
                self._socket.sendto(f"{self._rank} {self._entered()}".encode(), asker)
            if question == _QUESTION and not shown:
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
