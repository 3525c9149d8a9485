"""Which hosts a job may use: those that are listed now, and were found fit. For jobs that gain and lose hosts."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from job.errors import UsageError
from launch.elastic.places import Place, Places
from launch.hosts import hostfile
from launch.hosts.checks import Answer, Found
from launch.hosts.hostfile import Host

_LISTING_SECONDS = 2.0  # between two looks at the list
_SCRIPT_SECONDS = 30.0  # for a script to print it

Examine = Callable[[Sequence[Host], Sequence[Answer]], Found]


def discover(script: Path) -> list[Host]:
    """The hosts that ``script`` prints, in the forms of a hostfile: Horovod's ``host:slots``, one a line.

    Raises:
        UsageError: it fails, takes too long, or prints no hosts.
    """
    try:
        done = subprocess.run([str(script.absolute())], capture_output=True, text=True, timeout=_SCRIPT_SECONDS)
    except subprocess.TimeoutExpired:
        raise UsageError(f"{script}: printed no hosts within {_SCRIPT_SECONDS:g} s") from None
    except OSError as error:
        raise UsageError(f"{script}: cannot be run: {error.strerror}") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise UsageError(f"{script}: ended with exit code {done.returncode}: {last}")
    return hostfile.parse(done.stdout, str(script))


class Roster:
    """Keeps a list of hosts up to date, and checks those that are new to it, beside the job.

    Args:
        read: gives the hosts that are listed now, or raises UsageError.
        examine: asks hosts, which are compared with those that were found fit before.
        listed: the hosts with which the job begins.
        say: tells the user something.
        cooldown_seconds: see :class:`launch.elastic.places.Places`; for hosts that were lost, or are not fit.
    """

    def __init__(
        self,
        read: Callable[[], Sequence[Host]],
        examine: Examine,
        listed: Sequence[Host],
        say: Callable[[str], None],
        cooldown_seconds: float,
    ) -> None:
        self._read = read
        self._examine = examine
        self.listed = listed
        self._say = say
        self._left_out = Places(cooldown_seconds)
        self._fit: dict[str, Answer] = {}
        self._asking: set[str] = set()
        self._leaving: dict[str, str] = {}  # told to leave, and still listed: at which start of theirs, see Answer
        self._told: set[str] = set()
        self._over = threading.Event()

    def fit(self) -> dict[str, Answer]:
        """The answers of the hosts that can be used now, in the order of the list."""
        fit = self._fit.copy()
        return {
            host.name: fit[host.name] for host in self.listed if host.name in fit and host.name not in self._leaving
        }

    def slots(self, name: str) -> int:
        """How many ranks a fit host takes: as listed, or one for each GPU, or one."""
        listed = next((host.slots for host in self.listed if host.name == name), None)
        answer = self._fit.get(name)  # none if the list is without it since the caller has looked
        return listed or (answer.gpus if answer else 0) or 1

    def take_in(self, hosts: Sequence[Host]) -> Found:
        """Check hosts. Those that are fit are used from now on; what is wrong with the others is told once."""
        answers, problems = self._examine(hosts, list(self._fit.values()))
        wrong = {problem.host: problem for problem in problems if not problem.warning}
        for answer in answers:
            if self._leaving.get(answer.host) == answer.started:
                self._left_out.failed([Place(answer.host, 0)], time.monotonic())
            elif answer.host not in wrong:
                self._returns(answer.host)
                self._fit[answer.host] = answer
        for host, problem in wrong.items():
            self._left_out.failed([Place(host, 0)], time.monotonic())
            if (told := f"{host}: {problem.field}") not in self._told:
                self._told.add(told)
                self._say(f"without {problem}")
        return answers, problems

    def keep(self) -> None:
        """From now on read the list again and again, and check the hosts that are new to it or were lost."""
        threading.Thread(target=self._keep, name="roster", daemon=True).start()

    def close(self) -> None:
        """Ask nobody any more."""
        self._over.set()

    def lost(self, name: str) -> None:
        """A host was lost. It is checked again before it is used, at once or after a growing time."""
        self._fit.pop(name, None)
        self._left_out.failed([Place(name, 0)], time.monotonic())

    def leaves(self, name: str) -> None:
        """A host was told to leave. It is used again when it was started anew, or the list was without it for a while.

        A pod that is replaced keeps its name, and whoever prints the list may not see that it was gone.
        """
        answer = self._fit.pop(name, None)
        self._leaving.setdefault(name, answer.started if answer else "")
        self._left_out.failed([Place(name, 0)] * 2, time.monotonic())  # not asked at once, while its ranks stop

    def _returns(self, name: str) -> None:
        """A host that was told to leave is one like others again, if it ever was told so."""
        if self._leaving.pop(name, None) is not None:
            self._left_out.forget(Place(name, 0))

    def _keep(self) -> None:
        while not self._over.is_set():
            try:
                self.listed = self._read()
                self._told -= {"list"}
            except UsageError as error:
                if "list" not in self._told:
                    self._told.add("list")
                    self._say(f"{error}; the hosts stay as they are")
            listed = {host.name for host in self.listed}
            for name in {*self._leaving} - listed:
                self._returns(name)
            for name in {*self._fit} - listed:
                self._fit.pop(name, None)  # should it come back, it is checked again
            for host in self.listed:
                unknown = host.name not in self._fit and host.name not in self._asking
                if unknown and self._left_out.usable([Place(host.name, 0)], time.monotonic()):
                    self._asking.add(host.name)
                    threading.Thread(target=self._ask, args=(host,), daemon=True).start()
            self._over.wait(_LISTING_SECONDS)

    def _ask(self, host: Host) -> None:
        try:
            self.take_in([host])
        finally:
            self._asking.discard(host.name)
