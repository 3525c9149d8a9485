"""Keeps a job going while ranks die: what is left ends, and as many ranks as there are places go on from a commit.

There is one mechanism for all changes. A death: the others are killed, and new ranks go on from the last commit, which
lies in memory. A place that can be used again, or is to be left: all ranks stop after their step with a checkpoint, and
as many as there are places then go on. Nothing that was wounded is used again.

Where ranks run, a :class:`Ground` knows: this machine (launch/elastic/machine.py) or hosts (launch/hosts/ground.py).
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Optional, Protocol

from job.checkpoints.commits import Progress
from job.config import Config
from job.errors import Preempted, UsageError
from job.run_dir import CHANGES
from launch.elastic.places import Place, Places

_POLL_SECONDS = 0.02
_TOGETHER_SECONDS = 0.1  # ranks that end within this time have failed at once
_LEAVE_SECONDS = 60.0  # for ranks to end after the first one has ended well
_ECHO_SECONDS = 1.0  # launchers and process groups deliver one signal twice
STUCK = 256  # in place of an exit code, of a rank that should have ended and has not
_MOST_IN_VAIN = 3  # failures in a row, none of which came a step further: the next would not either
_MOST_KILLED_IN_VAIN = 10  # likewise, where somebody else has ended the ranks: that says less of the next ones
_STOPS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
_BEGIN = ("run.resume=", "run.overwrite=")
GO_ON = ("run.overwrite=false", "run.resume=auto")
_WELL = (0, Preempted.exit_code)


class Ended(NamedTuple):
    """A rank that has ended by itself. A negative code is the signal that ended it."""

    rank: int
    code: int
    host: str = ""  # empty on this machine
    lost: str = ""  # why nothing is known of the host any more

    @property
    def by_others(self) -> bool:
        """Whether it may have done nothing wrong. A kernel that is short of memory kills too."""
        return bool(self.lost) or self.code == -signal.SIGKILL

    def __str__(self) -> str:
        where = f" on {self.host}" if self.host else ""
        if self.lost:
            return f"{self.host} was lost: {self.lost}"
        if self.code == STUCK:
            return f"rank {self.rank}{where} did not end with the others"
        if self.code < 0:
            return f"rank {self.rank}{where} was ended by {signal.Signals(-self.code).name}"
        return f"rank {self.rank}{where} ended with exit code {self.code}"


class Gang(Protocol):
    """Ranks that were started together."""

    places: Sequence[Place]  # of each rank

    def ended(self) -> list[Ended]:
        """Those that have ended since the last call."""

    @property
    def over(self) -> bool:
        """Whether all have ended."""

    def signal(self, number: int) -> None:
        """Send a signal to all that still run."""

    def end(self) -> list[Ended]:
        """Kill what is left. Those of whom it shows only then that they were lost with their host.

        Raises:
            JobError: a process cannot be killed.
        """


class Ground(Protocol):
    """Where the ranks of a job run, and where their commits lie."""

    command: str  # of the user, who is told something

    def places(self) -> Sequence[Place]:
        """All that are there now, in the order in which they are filled."""

    def start(self, begin: Sequence[str], places: Sequence[Place], most: int) -> Gang:
        """Start ranks at ``places``, ``most`` of them at most, with the arguments ``begin`` beside those that last.

        Raises:
            JobError: they cannot be started.
        """

    def progress(self) -> Optional[Progress]:
        """Of the ranks that were started last; None before they have told it."""

    def prepare(self) -> None:
        """Called while ranks train: make the next start quick."""

    def together(self, place: Place) -> Sequence[Place]:
        """Those that are left out with this one."""

    def save(self) -> None:
        """Bring the newest commit to the disk, if it is newer than what is there. No rank runs any more.

        Raises:
            CheckpointError: it cannot be written.
        """

    def close(self) -> None:
        """The job is over."""


@dataclass
class Change:
    """Ranks have ended, and others are to go on."""

    why: str
    ranks_before: int
    steps: int  # that had been taken
    began: float  # of time.monotonic()

    def note(self, run_dir: Path, ranks: int, went_on: int, hosts: Mapping[str, int] = {}) -> str:
        """Write down what the change has cost, when it is over.

        Args:
            run_dir: the run's folder.
            ranks: that have gone on.
            went_on: after which step.
            hosts: how many ranks are on which; empty on this machine.

        Returns:
            what to tell the user.
        """
        replayed = max(0, self.steps - went_on)
        lost_seconds = time.monotonic() - self.began
        noted = {
            "step": went_on,
            "ranks_before": self.ranks_before,
            "ranks": ranks,
            "why": self.why,
            "replayed_steps": replayed,
            "lost_seconds": round(lost_seconds, 2),
            **({"hosts": dict(hosts)} if hosts else {}),
        }
        told = f"{_count(ranks)} went on after step {went_on}; lost: {replayed} steps, {lost_seconds:.1f} s"
        try:
            with open(run_dir / CHANGES, "a", encoding="utf-8") as stream:
                stream.write(json.dumps(noted) + "\n")
        except OSError as error:
            told += f" ({run_dir / CHANGES}: cannot be written: {error.strerror})"
        return told


class Supervisor:
    """One job, from its first ranks to its end.

    Args:
        ground: where they run.
        begin: ``run.resume`` and ``run.overwrite``, as the run is to begin. Later it goes on with what it has begun.
        config: of the run.
        least: ranks to go on with.
        most: ranks, however many places there are.
    """

    def __init__(self, ground: Ground, begin: Sequence[str], config: Config, least: int, most: int) -> None:
        self._ground = ground
        self._begin = begin
        self._config = config
        self._least = least
        self._most = most
        self._left_out = Places(config.elastic.cooldown_seconds)
        self._signals: list[tuple[float, int]] = []  # that came, and when
        self._progress: Optional[Progress] = None  # of these ranks
        self._steps = self._farthest = 0  # that the run has taken, and had ever taken before these ranks began
        self._begun = False  # whether there is anything to go on from
        self._resets = self._in_vain = 0
        self._change: Optional[Change] = None  # from the end of the last ranks to the first step of the next

    def run(self) -> int:
        """Train to the end. Returns the exit code of the contract. Nothing runs any more then."""
        for number in (*_STOPS, signal.SIGINT):
            signal.signal(number, lambda number, _: self._signals.append((time.monotonic(), number)))
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # `stty tostop` would stop ranks that write, for ever
        try:
            return self._train()
        finally:
            self._ground.close()

    def _train(self) -> int:
        while places := self._wait_for_places():
            gang = self._start(places)
            try:
                ended, change = self._watch(gang)
                self._note_progress(gang)
            finally:
                lost = gang.end()
            codes, size = {rank.code for rank in ended}, len(gang.places)
            if codes == {0} and gang.over:
                self._note_change(gang)
                return 0
            if self._signals:
                break
            if UsageError.exit_code in codes:
                return UsageError.exit_code if not self._begun else 1
            if codes <= {*_WELL} and gang.over and not lost:
                change = change or self._wanted(gang)
                if not change:  # somebody has asked a rank to stop, and all have
                    return self._leave(Preempted.exit_code)
                self._change = Change(change, size, self._steps, time.monotonic())
            elif not self._goes_on_after(_blamed(ended + lost, gang), gang):
                return self._leave(1)
        return self._leave(self._code_of_stop())

    # --- one attempt -------------------------------------------------------------------------------------------------

    def _usable(self) -> Sequence[Place]:
        return self._left_out.usable(self._ground.places(), time.monotonic())

    def _wait_for_places(self) -> Sequence[Place]:
        """The places to use now; none if the user or the patience ends before there are enough."""
        began, told = time.monotonic(), False
        while not self._signals:
            now = time.monotonic()
            usable = self._usable()
            if len(usable) >= self._least:
                return usable
            if now > began + self._config.elastic.timeout_seconds:
                self._say(f"fewer than {_count(self._least)} for {self._config.elastic.timeout_seconds:g} s: giving up")
                break
            if not told:
                told = True
                soon = self._left_out.next_return(now)
                self._say(
                    f"too few places, {len(usable)}" + (f"; the next can be used in {soon:.0f} s" if soon else "")
                )
            time.sleep(_POLL_SECONDS)
        return []

    def _start(self, places: Sequence[Place]) -> Gang:
        self._farthest, self._progress = max(self._farthest, self._steps), None
        begin = self._begin
        if self._begun:
            begin = GO_ON
        elif self._change and "run.resume=never" in begin:
            begin = ("run.overwrite=true",)  # it was found to hold nothing; what is there now is of the ranks that died
        return self._ground.start(begin, places, self._most)

    def _watch(self, gang: Gang) -> tuple[list[Ended], str]:
        """Those that ended, when all have, or one has failed, or is to. And why they were asked to, if they were."""
        ended: list[Ended] = []
        asked, change = False, ""
        deadline = float("inf")
        while not gang.over and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
            self._note_progress(gang)
            ended += gang.ended()
            if any(rank.code not in _WELL for rank in ended):
                time.sleep(_TOGETHER_SECONDS)
                return ended + gang.ended(), change
            if ended:
                deadline = min(deadline, time.monotonic() + _LEAVE_SECONDS)
            if self._at_once:
                return ended, change
            if self._signals and not asked:
                asked = True
                self._say("stopping after this step, with a checkpoint; a second signal stops at once")
                if not change:  # for which they stop already; a second signal would end them at once
                    gang.signal(signal.SIGTERM)
            elif self._trains and not asked and not change:
                self._ground.prepare()
                if not ended and (change := self._wanted(gang)):
                    gang.signal(signal.SIGTERM)
        return ended + gang.ended(), change

    @property
    def _trains(self) -> bool:
        """Whether these ranks have taken a step."""
        return self._progress is not None and self._progress.steps > self._progress.went_on

    def _wanted(self, gang: Gang) -> str:
        """Why other places than these are to be used; empty if there is no reason."""
        there, usable = self._ground.places(), self._usable()
        if gone := sorted({place.host for place in gang.places if place not in there}):
            return f"{' and '.join(gone)} left"
        if min(len(usable), self._most) <= len(gang.places):
            return ""
        joined = sorted({place.host for place in usable} - {place.host for place in gang.places})
        return f"{' and '.join(joined)} joined" if joined else "a place can be used again"

    # --- between two -------------------------------------------------------------------------------------------------

    def _goes_on_after(self, failed: Sequence[Ended], gang: Gang) -> bool:
        """Note a failure. Whether others are to go on."""
        why = " and ".join(dict.fromkeys(map(str, failed)))
        places = {place for rank in failed for place in self._ground.together(gang.places[rank.rank])}
        self._left_out.failed(places, time.monotonic())
        self._resets += 1
        self._in_vain = 0 if self._steps > self._farthest else self._in_vain + 1
        if self._change:
            self._change.why += f"; then {why}"
            self._change.steps = max(self._change.steps, self._steps)
        else:
            self._change = Change(why, len(gang.places), self._steps, time.monotonic())
        if self._in_vain >= (_MOST_KILLED_IN_VAIN if all(rank.by_others for rank in failed) else _MOST_IN_VAIN):
            self._say(f"{why}; {self._in_vain} failures without a step more: giving up")
            return False
        if self._resets > self._config.elastic.max_resets:
            self._say(f"{why}; more than elastic.max_resets={self._config.elastic.max_resets} failures: giving up")
            return False
        self._say(f"{why}; going on with {_count(min(len(self._usable()), self._most))}")
        return True

    def _note_progress(self, gang: Gang) -> None:
        self._progress = self._ground.progress()
        if self._progress:
            self._begun = True
            self._steps = self._progress.steps
        if self._trains:
            self._note_change(gang)

    def _note_change(self, gang: Gang) -> None:
        """Write down what a change has cost, when it is over."""
        change, self._change = self._change, None
        if not change:
            return
        hosts = Counter(place.host for place in gang.places if place.host)
        went_on = self._progress.went_on if self._progress else self._steps
        self._say(change.note(self._config.run.dir, len(gang.places), went_on, hosts))

    # --- the end -----------------------------------------------------------------------------------------------------

    @property
    def _at_once(self) -> bool:
        """Whether the user does not want to wait for a checkpoint: at Ctrl-C, and at a second signal."""
        first = self._signals[0][0] if self._signals else 0.0
        return any(number == signal.SIGINT or when > first + _ECHO_SECONDS for when, number in self._signals)

    def _say(self, message: str) -> None:
        with contextlib.suppress(OSError):  # whoever read it may be gone
            print(f"{self._ground.command}: {message}", file=sys.stderr, flush=True)

    def _code_of_stop(self) -> int:
        if any(number == signal.SIGINT for _, number in self._signals):
            return 128 + signal.SIGINT
        if self._at_once or not self._begun:
            return 128 + signal.SIGTERM
        return Preempted.exit_code

    def _leave(self, code: int) -> int:
        """Bring the last commit to the disk, if it is newer than what is there."""
        if self._begun:
            self._ground.save()
        if code == Preempted.exit_code:
            self._say("preempted, with a checkpoint written; the same command goes on from there")
        return code


class Plan(NamedTuple):
    """What the ranks of a job have in common.

    Args:
        begin: arguments for those ranks with which the run begins.
        lasting: arguments for all ranks.
    """

    begin: list[str]
    lasting: list[str]


def plan(arguments: Sequence[str], config: Config, most: int) -> Plan:
    """From the arguments of train.py, which come to ``config``, to those of each start. ``most`` ranks may come.

    Raises:
        UsageError: another number of ranks would change what is learned.
    """
    if config.data.global_batch is None:
        raise UsageError(
            "--min-np needs data.global_batch: with data.batch_per_rank each change of the ranks would change what is"
            " learned"
        )
    if config.train.fp16_allreduce:
        raise UsageError(
            "--min-np cannot have train.fp16_allreduce=true: each change of the ranks would change the bits of what is"
            " learned"
        )
    begin = [argument for argument in arguments if argument.startswith(_BEGIN)]
    lasting = [argument for argument in arguments if argument not in begin]
    if most > config.data.shards:
        lasting.append(f"data.shards={most}")  # fewer ranks would go on with fewer
    return Plan(begin, lasting)


def _blamed(ended: Sequence[Ended], gang: Gang) -> list[Ended]:
    """The ranks that failed: that one ends because it misses another is the effect of that one's death."""
    lost = [rank for rank in ended if rank.lost]
    killed = [rank for rank in ended if rank.code < 0]
    failed = [rank for rank in ended if rank.code not in _WELL]
    known = {rank.rank for rank in ended}
    late = [Ended(rank, STUCK, place.host) for rank, place in enumerate(gang.places) if rank not in known]
    return lost or killed or failed or late


def _count(ranks: int) -> str:
    return f"{ranks} rank{'s' * (ranks != 1)}"
