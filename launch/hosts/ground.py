"""Hosts as the ground of a job whose ranks may die: an agent on each, and commits in the memory of each.

After a step all ranks hold the same state, so the first rank of each host writes the commits of that host. A host that
is lost takes its own along, and the others have them all the same. Rank 0 runs where the newest is.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import time
from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any, Optional

from horovod.runner.gloo_run import create_slot_env_vars

from job.checkpoints.commits import Progress
from job.errors import CheckpointError, JobError
from launch.elastic.gang import Rendezvous
from launch.elastic.places import Place
from launch.elastic.supervisor import Ended
from launch.hosts.checks import Answer
from launch.hosts.roster import Roster
from launch.hosts.supervise import Event, Link, Site, print_line, why_lost
from launch.rank import slot

_POLL_SECONDS = 0.02
_ANSWER_SECONDS = 20.0  # for an agent to say what it has
_KILL_SECONDS = 10.0  # for an agent to confirm that its ranks are over
_SAVE_SECONDS = 120.0
_LEAVE_SECONDS = 5.0  # for agents to remove what they keep
Network = Callable[[Sequence[Answer], int], Mapping[str, Mapping[str, str]]]
_LOST = 1  # in place of the exit code of a rank, which nobody knows


class Member:
    """A host that takes part: its agent, and what that says to have."""

    def __init__(self, answer: Answer, site: Site, events: queue.SimpleQueue[tuple[Member, Event]]) -> None:
        self.name, self.answer = answer.host, answer
        self.answered = False  # the last question
        self.commit = self.checkpoint = -1  # the newest of its memory, and of run.dir as it sees that
        self.saved: Optional[str] = None  # what went wrong, if it was asked to
        self.link = Link(site, lambda event: events.put((self, event)))
        self.look()

    def look(self) -> None:
        """Ask what it has."""
        self.answered = False
        self.link.send("look")

    @property
    def newest(self) -> int:
        """After how many steps its commit was written, if that is newer than the checkpoint; else -1."""
        return self.commit if self.commit > self.checkpoint else -1


class HostGang:
    """Ranks on hosts that were started together: a :class:`launch.elastic.supervisor.Gang`.

    Args:
        places: of the ranks.
        members: the hosts that are there; of a place on another one the rank is lost at once.
        plan: of all ranks: ``command`` and ``environment``.
        network: the variables of each host by which its ranks find one another, for a port of this machine.
        hear: takes in what the agents have said, and tells it to this gang.
    """

    def __init__(
        self,
        places: Sequence[Place],
        members: Mapping[str, Member],
        plan: Mapping[str, Any],
        network: Network,
        hear: Callable[[], None],
    ) -> None:
        self.places = places
        self._members = {place.host: members[place.host] for place in places if place.host in members}
        self.busy = {*self._members}  # hosts on which ranks may run
        self._hear = hear
        self._codes: dict[int, int] = {}
        self._news: list[Ended] = []
        counts = Counter(place.host for place in places)
        where = [(host, local) for host, count in enumerate(counts.values()) for local in range(count)]
        slots = [slot([*counts.values()], host, rank, local) for rank, (host, local) in enumerate(where)]
        self._server = Rendezvous("0.0.0.0", slots)
        variables = network([member.answer for member in self._members.values()], self._server.port)
        for name, member in self._members.items():
            own = [create_slot_env_vars(slots[rank]) for rank, place in enumerate(places) if place.host == name]
            environment = {**plan["environment"], **variables[name]}
            member.link.send(json.dumps({**plan, "environment": environment, "ranks": own}))
        for name in counts:
            if name not in self._members:
                self.lose(name, "it does not answer")

    def ended(self) -> list[Ended]:
        """Those that have ended since the last call."""
        self._hear()
        news, self._news = self._news, []
        return news

    @property
    def over(self) -> bool:
        """Whether all have ended."""
        return not self.busy

    def signal(self, number: int) -> None:
        """Ask all that still run to stop."""
        for name in self.busy:
            self._members[name].link.send("term" if number == signal.SIGTERM else "kill")

    def end(self) -> list[Ended]:
        """Kill what is left. On a host that does not answer, the agent does so when it hears nothing more."""
        if self.busy:
            self.signal(signal.SIGKILL)
        end = time.monotonic() + _KILL_SECONDS
        while self.busy and time.monotonic() < end:
            time.sleep(_POLL_SECONDS)
            self._hear()
        for name in sorted(self.busy):
            self._members[name].link.abandon()
            self.lose(name, "it does not answer")
        self._server.stop()
        return [rank for rank in self.ended() if rank.lost]

    def note(self, rank: int, code: int) -> None:
        """A rank has ended."""
        self._codes[rank] = code
        self._news.append(Ended(rank, code, self.places[rank].host))

    def lose(self, host: str, why: str) -> None:
        """Nothing is known of a host any more."""
        self.busy.discard(host)
        for rank, place in enumerate(self.places):
            if place.host == host and rank not in self._codes:
                self._codes[rank] = _LOST
                self._news.append(Ended(rank, _LOST, host, why))


class HostGround:
    """A :class:`launch.elastic.supervisor.Ground` of several hosts.

    Args:
        roster: of the hosts.
        site: what starts the agent of a fit host, and its plan.
        network: see :class:`HostGang`.
        plan: see :class:`HostGang`; ``begin`` is added to its command.
        say: tells the user something.
    """

    command = "launch/cluster.sh"

    def __init__(
        self,
        roster: Roster,
        site: Callable[[Answer], Site],
        network: Network,
        plan: Mapping[str, Any],
        say: Callable[[str], None],
    ) -> None:
        self._roster = roster
        self._site = site
        self._network = network
        self._plan = plan
        self._say = say
        self._events: queue.SimpleQueue[tuple[Member, Event]] = queue.SimpleQueue()
        self._members: dict[str, Member] = {}
        self._gang: Optional[HostGang] = None
        self._progress: Optional[Progress] = None
        self._first = ""  # the host of rank 0
        self._checkpoint = -1  # the newest in run.dir that was seen there
        self._told = False

    def places(self) -> Sequence[Place]:
        """Of all hosts that are listed, fit, and have an agent that answers."""
        self._hear()
        fit = self._roster.fit()
        if not (self._gang and self._gang.busy):
            self._dismiss(fit)  # a machine that is to go down waits for its agent
        alone = not self._members
        for name, answer in fit.items():
            if name not in self._members:
                self._members[name] = Member(answer, self._site(answer), self._events)
        if alone:
            self._look()  # to begin with all, and not with those that answer first
        there = [name for name in fit if self._answers(name) or self._takes_part(name)]
        return [Place(name, number) for name in there for number in range(self._roster.slots(name))]

    def start(self, begin: Sequence[str], places: Sequence[Place], most: int) -> HostGang:
        """Start ranks, the first of them on the host with the newest commit."""
        self._gang, self._progress = None, None
        self._dismiss(self._roster.fit())
        self._look()
        hosts = list(dict.fromkeys(place.host for place in places))
        members = [self._members[name] for name in hosts if name in self._members]
        able = [member for member in members if member.checkpoint >= self._checkpoint]
        if members and not able:
            raise JobError(
                f"rank 0 ran on {self._first}, and no host that is left sees the checkpoints in run.dir; when"
                f" {self._first} is back, the same command goes on; with run.dir on a file system that all hosts share,"
                " they go on by themselves"
            )
        self._first = max(able, key=lambda member: member.newest).name if able else hosts[0]
        chosen = sorted(places, key=lambda place: place.host != self._first)[:most]
        plan = {**self._plan, "command": [*self._plan["command"], *begin]}
        self._gang = HostGang(chosen, self._members, plan, self._network, self._hear)
        return self._gang

    def progress(self) -> Optional[Progress]:
        """As the first rank of any host has told it."""
        self._hear()
        return self._progress

    def prepare(self) -> None:
        """Nothing waits on the hosts."""

    def together(self, place: Place) -> Sequence[Place]:
        """All places of the host: what is wrong with one is mostly wrong with all."""
        return [other for other in self._gang.places if other.host == place.host] if self._gang else [place]

    def save(self) -> None:
        """Have the host with the newest commit bring it to run.dir, if it sees that."""
        self._look()
        able = [member for member in self._members.values() if member.checkpoint >= self._checkpoint]
        newest = max(able, key=lambda member: member.newest, default=None)
        if not newest or newest.newest < 0:
            return
        newest.link.send("save")
        self._wait(lambda: newest.saved is not None, _SAVE_SECONDS)
        if newest.saved or newest.saved is None:
            raise CheckpointError(newest.saved or f"{newest.name} has not written the last commit in time")

    def close(self) -> None:
        """Let all agents leave, and remove what they keep."""
        self._roster.close()
        self._dismiss(())
        self._wait(lambda: not self._members, _LEAVE_SECONDS)
        for member in self._members.values():
            member.link.abandon()

    # --- what the agents say -----------------------------------------------------------------------------------------

    def _hear(self) -> None:
        """Take in all that was said."""
        with contextlib.suppress(queue.Empty):
            while True:
                member, event = self._events.get_nowait()
                if self._members.get(member.name) is not member:
                    continue  # it was given up
                if event.kind == "lost":
                    self._lose(member, why_lost(event))
                elif event.kind == "code" and self._gang:
                    self._gang.note(event.rank, event.number)
                elif event.kind == "said":
                    self._note(member, event.said)
                elif event.kind == "line" and not print_line(event):  # nobody reads it any more
                    os.kill(os.getpid(), signal.SIGHUP)

    def _note(self, member: Member, said: Mapping[str, Any]) -> None:
        if "progress" in said:
            self._note_progress(Progress(*said["progress"]))
        elif "ended" in said and self._gang:
            self._gang.busy.discard(member.name)
        elif "leaving" in said:
            self._roster.leaves(member.name)
        elif "saved" in said:
            member.saved = said["saved"]
        elif "commit" in said:
            member.answered, member.commit, member.checkpoint = True, said["commit"], said["checkpoint"]
            self._compare()

    def _note_progress(self, progress: Progress) -> None:
        if not self._progress:
            for member in self._members.values():
                member.look()  # rank 0 has claimed run.dir by now
        elif progress.steps < self._progress.steps:
            return  # of a host that tells it later
        self._progress = progress

    def _compare(self) -> None:
        """Once ranks train: does every host see what rank 0 writes?"""
        first = self._members.get(self._first)
        if not self._progress or not first or not first.answered:
            return
        self._checkpoint = first.checkpoint
        blind = [m.name for m in self._members.values() if m.answered and m.checkpoint < 0 <= first.checkpoint]
        if blind and not self._told:
            self._told = True
            lost = f"if {self._first} is lost, the job ends"
            self._say(f"warning: {', '.join(blind)}: run.dir is not that of {self._first}; {lost}")

    def _lose(self, member: Member, why: str) -> None:
        del self._members[member.name]
        if member.name in self._roster.fit():
            self._roster.lost(member.name)
        if self._gang:
            self._gang.lose(member.name, why)

    # --- what they are told ------------------------------------------------------------------------------------------

    def _answers(self, name: str) -> bool:
        return name in self._members and self._members[name].answered

    def _takes_part(self, name: str) -> bool:
        return bool(self._gang and name in self._gang.busy)

    def _look(self) -> None:
        """Ask all what they have. Whoever does not answer is lost."""
        for member in self._members.values():
            member.look()
        self._wait(lambda: all(member.answered for member in self._members.values()), _ANSWER_SECONDS)
        for member in list(self._members.values()):
            if not member.answered:
                member.link.abandon()
                self._lose(member, "it does not answer")

    def _dismiss(self, but: Container[str]) -> None:
        for name, member in self._members.items():
            if name not in but:
                member.link.close()

    def _wait(self, condition: Callable[[], bool], seconds: float) -> None:
        end = time.monotonic() + seconds
        while not condition() and time.monotonic() < end:
            time.sleep(_POLL_SECONDS)
            self._hear()
