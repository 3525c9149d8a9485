"""Keeps a job going while ranks die: what is left ends, and as many ranks as there are places go on from a commit.

There is one mechanism for all changes. A death: the others are killed, and new ranks go on from the last commit, which
lies in memory. A place that can be used again: all ranks stop after their step with a checkpoint, and more of them go
on. Nothing that was wounded is used again.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from job.checkpoints import commits
from job.checkpoints.commits import Progress
from job.config import Config
from job.distributed import gpus
from job.errors import Preempted, UsageError
from job.run_dir import CHANGES
from launch.elastic.gang import STUCK, Crew, Ended, Gang
from launch.elastic.places import Places

_POLL_SECONDS = 0.02
_TOGETHER_SECONDS = 0.1  # ranks that end within this time have failed at once
_LEAVE_SECONDS = 60.0  # for ranks to end after the first one has ended well
_ECHO_SECONDS = 1.0  # launchers and process groups deliver one signal twice
_MOST_IN_VAIN = 3  # failures in a row, none of which came a step further: the next would not either
_STOPS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
_VISIBLE = "CUDA_VISIBLE_DEVICES"
_GO_ON = ("run.overwrite=false", "run.resume=auto")
_WELL = (0, Preempted.exit_code)


@dataclass
class Change:
    """Ranks have ended, and others are to go on."""

    why: str
    ranks_before: int
    steps: int  # that had been taken
    began: float  # of time.monotonic()


class Supervisor:
    """One job on this machine, from its first ranks to its end.

    Args:
        command: of a rank, with all arguments of train.py but those in ``begin``.
        begin: ``run.resume`` and ``run.overwrite``, as the run is to begin. Later it goes on with what it has begun.
        config: that these come to.
        ranks: as many as there are places.
        least: ranks to go on with.
        memory: the folder for the commits.
    """

    def __init__(
        self,
        command: Sequence[str],
        begin: Sequence[str],
        config: Config,
        ranks: int,
        least: int,
        memory: Path,
    ) -> None:
        self._command = command
        self._begin = begin
        self._config = config
        self._least = least
        self._memory = memory
        self._places = Places(ranks, config.elastic.cooldown_seconds)
        self._all = ranks
        self._signals: list[tuple[float, int]] = []  # that came, and when
        self._progress: Optional[Progress] = None  # of these ranks
        self._steps = self._farthest = 0  # that the run has taken, and had ever taken before these ranks began
        self._begun = False  # whether there is anything to go on from
        self._resets = self._in_vain = 0
        self._crew: Optional[Crew] = None  # for as many ranks as there are places
        self._change: Optional[Change] = None  # from the end of the last ranks to the first step of the next

    def run(self) -> int:
        """Train to the end. Returns the exit code of the contract. Nothing runs any more then."""
        for number in (*_STOPS, signal.SIGINT):
            signal.signal(number, lambda number, _: self._signals.append((time.monotonic(), number)))
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # `stty tostop` would stop ranks that write, for ever
        try:
            return self._train()
        finally:
            self._dismiss_crew()

    def _train(self) -> int:
        while places := self._wait_for_places():
            gang = self._start(places)
            try:
                ended, growing = self._watch(gang)
                self._note_progress(gang)
            finally:
                gang.end()
            codes = {rank.code for rank in ended}
            if codes == {0} and gang.over:
                self._note_change(gang.size)
                return 0
            if self._signals:
                break
            if UsageError.exit_code in codes:
                return UsageError.exit_code if not self._begun else 1
            if codes <= {*_WELL} and gang.over:
                if not growing:  # somebody has asked a rank to stop, and all have
                    return self._leave(Preempted.exit_code)
                self._change = Change("a place can be used again", gang.size, self._steps, time.monotonic())
            elif not self._goes_on_after(_blamed(ended, gang.size), places, gang.size):
                return self._leave(1)
        return self._leave(self._code_of_stop())

    # --- one attempt -------------------------------------------------------------------------------------------------

    def _wait_for_places(self) -> Sequence[int]:
        """The places to use now; none if the user or the patience ends before there are enough."""
        began, told = time.monotonic(), False
        while not self._signals:
            now = time.monotonic()
            usable = self._places.usable(now)
            if len(usable) >= self._least:
                return usable
            if now > began + self._config.elastic.timeout_seconds:
                _say(f"fewer than {_count(self._least)} for {self._config.elastic.timeout_seconds:g} s: giving up")
                break
            if not told:
                told = True
                _say(f"too few places, {len(usable)}; the next can be used in {self._places.next_return(now):.0f} s")
            time.sleep(_POLL_SECONDS)
        return []

    def _start(self, places: Sequence[int]) -> Gang:
        commits.forget_progress(self._memory)
        self._farthest, self._progress = max(self._farthest, self._steps), None
        begin = self._begin
        if self._begun:
            begin = _GO_ON
        elif self._change and "run.resume=never" in begin:
            begin = ("run.overwrite=true",)  # it was found to hold nothing; what is there now is of the ranks that died
        variables = {commits.FOLDER: str(self._memory), **_gpus(places, self._all)}
        crew = self._crew if _VISIBLE not in variables else None  # what waits has seen all GPUs
        gang = Gang([*self._command, *begin], len(places), variables, crew)
        self._dismiss_crew()
        return gang

    def _dismiss_crew(self) -> None:
        if self._crew:
            self._crew.dismiss()
        self._crew = None

    def _watch(self, gang: Gang) -> tuple[list[Ended], bool]:
        """Those that ended, when all have, or one has failed, or is to. And whether they were asked to, for others."""
        ended: list[Ended] = []
        asked = growing = False
        deadline = float("inf")
        while not gang.over and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
            self._note_progress(gang)
            ended += gang.ended()
            if any(rank.code not in _WELL for rank in ended):
                time.sleep(_TOGETHER_SECONDS)
                return ended + gang.ended(), growing
            if ended:
                deadline = min(deadline, time.monotonic() + _LEAVE_SECONDS)
            if self._at_once:
                return ended, growing
            if self._signals and not asked:
                asked = True
                _say("stopping after this step, with a checkpoint; a second signal stops at once")
                gang.signal(signal.SIGTERM)
            elif not self._crew and self._trains:
                self._crew = Crew([*self._command, *_GO_ON], self._all)
            elif not growing and not ended and self._can_grow(gang):
                growing = True
                gang.signal(signal.SIGTERM)
        return ended, growing

    @property
    def _trains(self) -> bool:
        """Whether these ranks have taken a step."""
        return self._progress is not None and self._progress.steps > self._progress.went_on

    def _can_grow(self, gang: Gang) -> bool:
        return self._trains and len(self._places.usable(time.monotonic())) > gang.size

    # --- between two -------------------------------------------------------------------------------------------------

    def _goes_on_after(self, failed: Sequence[Ended], places: Sequence[int], size: int) -> bool:
        """Note a failure. Whether others are to go on."""
        why = " and ".join(map(str, failed))
        self._places.failed([places[rank.rank] for rank in failed], time.monotonic())
        self._resets += 1
        self._in_vain = 0 if self._steps > self._farthest else self._in_vain + 1
        if self._change:
            self._change.why += f"; then {why}"
            self._change.steps = max(self._change.steps, self._steps)
        else:
            self._change = Change(why, size, self._steps, time.monotonic())
        if self._in_vain >= _MOST_IN_VAIN:
            _say(f"{why}; {_MOST_IN_VAIN} failures without a step more: giving up")
            return False
        if self._resets > self._config.elastic.max_resets:
            _say(f"{why}; more than elastic.max_resets={self._config.elastic.max_resets} failures: giving up")
            return False
        _say(f"{why}; going on with {_count(len(self._places.usable(time.monotonic())))}")
        return True

    def _note_progress(self, gang: Gang) -> None:
        self._progress = commits.progress(self._memory)
        if self._progress:
            self._begun = True
            self._steps = self._progress.steps
        if self._trains:
            self._note_change(gang.size)

    def _note_change(self, ranks: int) -> None:
        """Write down what a change has cost, when it is over."""
        change, self._change = self._change, None
        if not change:
            return
        went_on = self._progress.went_on if self._progress else self._steps
        replayed = max(0, change.steps - went_on)
        lost_seconds = time.monotonic() - change.began
        noted = {
            "step": went_on,
            "ranks_before": change.ranks_before,
            "ranks": ranks,
            "why": change.why,
            "replayed_steps": replayed,
            "lost_seconds": round(lost_seconds, 2),
        }
        try:
            with open(self._config.run.dir / CHANGES, "a", encoding="utf-8") as stream:
                stream.write(json.dumps(noted) + "\n")
        except OSError as error:
            _say(f"{self._config.run.dir / CHANGES}: cannot be written: {error.strerror}")
        _say(f"{_count(ranks)} went on after step {went_on}; lost: {replayed} steps, {lost_seconds:.1f} s")

    # --- the end -----------------------------------------------------------------------------------------------------

    @property
    def _at_once(self) -> bool:
        """Whether the user does not want to wait for a checkpoint: at Ctrl-C, and at a second signal."""
        first = self._signals[0][0] if self._signals else 0.0
        return any(number == signal.SIGINT or when > first + _ECHO_SECONDS for when, number in self._signals)

    def _code_of_stop(self) -> int:
        if any(number == signal.SIGINT for _, number in self._signals):
            return 128 + signal.SIGINT
        if self._at_once or not self._begun:
            return 128 + signal.SIGTERM
        return Preempted.exit_code

    def _leave(self, code: int) -> int:
        """Bring the last commit to the disk, if it is newer than what is there."""
        if self._begun:
            commits.bring_to_disk(self._memory, self._config.run.dir)
        if code == Preempted.exit_code:
            _say("preempted, with a checkpoint written; the same command goes on from there")
        return code


def _blamed(ended: Sequence[Ended], size: int) -> list[Ended]:
    """The ranks that failed: that one ends because it misses another is the effect of that one's death."""
    killed = [rank for rank in ended if rank.code < 0]
    failed = [rank for rank in ended if rank.code not in _WELL]
    late = [Ended(rank, STUCK) for rank in range(size) if rank not in {one.rank for one in ended}]
    return killed or failed or late


def _gpus(places: Sequence[int], count: int) -> dict[str, str]:
    """What shows the ranks the GPUs of their places alone, where some are left out."""
    if len(places) == count or not gpus.count(gpus.listing(), os.environ.get(_VISIBLE)):
        return {}
    entries = (os.environ.get(_VISIBLE) or ",".join(map(str, range(count)))).split(",")
    return {_VISIBLE: ",".join(entries[place] for place in places)}


def _count(ranks: int) -> str:
    return f"{ranks} rank{'s' * (ranks != 1)}"


def _say(message: str) -> None:
    with contextlib.suppress(OSError):  # whoever read it may be gone
        print(f"launch/local.sh: {message}", file=sys.stderr, flush=True)
