"""Imported by launch/cluster.py: all hosts of a job together. Their output, and how the job ends on all of them."""

from __future__ import annotations

import contextlib
import json
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any, NamedTuple, Optional

from job.errors import Preempted

PREEMPTED = Preempted.exit_code
_BEATS = 6  # signs of life in the silence after which an agent takes us for dead
_MISSED_BEATS = 3  # of an agent, which has as many: its host is taken for dead
_SSH_FAILED = 255  # its own exit code; all others are those of the command
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
_TERM_SECONDS = 5.0  # for ranks whose peer has died: they cannot finish their step, only say what they know
SILENCE_SECONDS = 60.0  # after which an agent takes the launcher for dead: a cut link closes no connection
_ECHO_SECONDS = 1.0  # timeout(1) and process groups deliver one signal twice
_KILL_SECONDS = 5.0  # for hosts to confirm that all is over


class Site(NamedTuple):
    """One host of the job: the command that starts the agent there, and the plan that it is sent."""

    host: str
    command: Sequence[str]
    plan: Mapping[str, Any]

    @property
    def ranks(self) -> list[int]:
        """Those that run there."""
        return [int(variables["HOROVOD_RANK"]) for variables in self.plan["ranks"]]


@dataclass
class Event:
    """Something that a thread or a signal handler tells the supervisor."""

    kind: str  # line, code, lost, signal, said
    host: str = ""
    rank: int = -1
    number: int = 0  # the exit code, or the signal
    text: str = ""
    stream: str = "stdout"
    said: Mapping[str, Any] = field(default_factory=dict)


_NEWS = {"progress", "ended", "leaving", "commit", "saved"}  # of an agent that stays


class Link:
    """The agent of one host, seen from here."""

    def __init__(self, site: Site, tell: Any) -> None:
        self.site = site
        self.over = False
        self._tell = tell
        self._last_error = ""
        self._missing: Optional[int] = None  # beats of ours since the agent's last word; None before its first
        # A session of its own: Ctrl-C must not end the connection over which the ranks are asked to stop.
        self._process = subprocess.Popen(
            site.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self._words: queue.SimpleQueue[Optional[str]] = queue.SimpleQueue()
        self.send(json.dumps(site.plan))
        threading.Thread(target=self._write, daemon=True).start()
        threading.Thread(target=self._read, daemon=True).start()

    def send(self, word: str) -> None:
        """Tell the agent something. Never waits: a host that does not read must not stop the others."""
        self._words.put(word)

    def close(self) -> None:
        """Nothing more will be said: an agent that stays, leaves."""
        self._words.put(None)

    def abandon(self) -> None:
        """Give up the connection."""
        self._process.kill()

    def _write(self) -> None:
        pipe = self._process.stdin
        assert pipe is not None
        beat_seconds = self.site.plan["silence_seconds"] / _BEATS
        try:
            while not self.over:
                try:
                    word = self._words.get(timeout=beat_seconds)
                except queue.Empty:
                    word = "here"
                    self._count_silence()
                if word is None:
                    pipe.close()
                    return
                pipe.write(word.encode() + b"\n")
                pipe.flush()
        except OSError:
            pass  # the end of the connection is told by _read

    def _count_silence(self) -> None:
        """Give up an agent that says nothing more. Beats are counted, not seconds: we may have been paused with it."""
        if self._missing is not None:
            self._missing += 1
            if self._missing > _MISSED_BEATS:
                self._last_error = "it does not answer"
                self.abandon()

    def _read(self) -> None:
        errors = threading.Thread(target=self._read_errors, args=(self._process.stderr,), daemon=True)
        errors.start()
        for line in self._process.stdout or ():
            self._understand(line.decode(errors="replace").rstrip())
        code = self._process.wait()
        errors.join(1.0)
        self._tell(Event("lost", self.site.host, number=code, text=self._last_error))

    def _understand(self, line: str) -> None:
        host = self.site.host
        try:
            said = json.loads(line)
            rank = int(said.get("rank", -1))
        except (ValueError, AttributeError, TypeError):  # a login script's
            self._tell(Event("line", host, text=line, stream="stderr"))
            return
        self._missing = 0
        if "error" in said:
            self._last_error = said["error"]
        elif "code" in said:
            self._tell(Event("code", host, rank, said["code"]))
        elif _NEWS & said.keys():
            self._tell(Event("said", host, said=said))
        elif "text" in said:
            self._tell(Event("line", host, rank, text=said["text"], stream=said["stream"]))

    def _read_errors(self, pipe: IO[bytes]) -> None:
        for line in pipe:
            self._last_error = line.decode(errors="replace").strip() or self._last_error
            self._tell(Event("line", self.site.host, text=self._last_error, stream="stderr"))


class Cause(NamedTuple):
    """Why the job ends. The heaviest is blamed: that a rank misses another is the effect of that one's death."""

    weight: int
    code: int
    words: str


class Job:
    """The ranks of all sites, from their start to the end of the last one.

    Args:
        sites: the hosts with their plans.
        stop_seconds: how long ranks that are asked to stop may take for their checkpoint.
    """

    def __init__(self, sites: Sequence[Site], stop_seconds: float) -> None:
        self._sites = sites
        self._stop_seconds = stop_seconds
        # Not a Queue: a signal handler puts into it, in the thread that may be reading.
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._links: list[Link] = []
        self._codes: dict[int, int] = {}
        self._causes: list[Cause] = []  # in the order in which they became known
        self._signal = 0
        self._heard = 0.0  # when the signal came
        self._sent = ""  # the last word
        self._due: list[tuple[float, str]] = []  # when to send which word, should the job not be over by then

    def run(self) -> int:
        """Start the job, wait for its end, return the exit code. All is over then, on every host that answers."""
        for number in _SIGNALS:
            signal.signal(number, lambda number, _: self._events.put(Event("signal", number=number)))
        self._links = [Link(site, self._events.put) for site in self._sites]
        while not all(link.over for link in self._links):
            event = self._next()
            if event:
                getattr(self, f"_on_{event.kind}")(event)
        return self._verdict()

    def _next(self) -> Optional[Event]:
        """The next event, or None after something that was due has been done."""
        try:
            return self._events.get(timeout=max(0.0, self._due[0][0] - time.monotonic()) if self._due else None)
        except queue.Empty:
            _, word = self._due.pop(0)
            self._send(word)
            return None

    @property
    def _killing(self) -> bool:
        """Whether ranks and connections now end because they are ended from here."""
        return self._sent in ("kill", "abandon")

    def _send(self, word: str) -> None:
        self._sent = word
        for link in self._links:
            if word == "abandon" and not link.over:
                ends = f"what runs there asks its ranks to stop after {SILENCE_SECONDS:g} s without a word"
                _say(f"{link.site.host} does not answer; {ends}")
                link.abandon()
            elif word != "abandon":
                link.send(word)

    def _stop(self, word: str, *then: tuple[float, str]) -> None:
        """Send a word now, and the others after the seconds given, each counted from the one before."""
        self._send(word)
        end = time.monotonic()
        self._due = []
        for seconds, later in then:
            end += seconds
            self._due.append((end, later))

    def _on_line(self, event: Event) -> None:
        if not print_line(event):
            self._on_signal(Event("signal", number=signal.SIGHUP))

    def _on_code(self, event: Event) -> None:
        self._codes[event.rank] = event.number
        if event.number:
            ended_from_here = self._killing or (self._sent and event.number == -signal.SIGTERM)
            killed = event.number < 0 and not ended_from_here
            words = f"rank {event.rank} on {event.host} {_ending(event.number)}"
            self._blame(Cause(1 if killed else 0, event.number, words))

    def _on_lost(self, event: Event) -> None:
        link = next(link for link in self._links if link.site.host == event.host)
        link.over = True
        missing = [rank for rank in link.site.ranks if rank not in self._codes]
        if missing:
            ranks = f"rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing))}"
            self._blame(Cause(0 if self._killing else 2, 1, f"{event.host} ({ranks}) was lost: {why_lost(event)}"))

    def _blame(self, cause: Cause) -> None:
        """Note the cause; the first one ends the job everywhere."""
        self._causes.append(cause)
        if len(self._causes) > 1 or self._signal:
            return
        if cause.code == PREEMPTED:  # the others are leaving as well, and need the time
            self._stop("term", (self._stop_seconds, "kill"), (_KILL_SECONDS, "abandon"))
        else:
            _say(f"{cause.words}; ending the others")
            self._stop("term", (_TERM_SECONDS, "kill"), (_KILL_SECONDS, "abandon"))

    def _on_signal(self, event: Event) -> None:
        if self._signal and time.monotonic() < self._heard + _ECHO_SECONDS:
            return
        again = bool(self._signal or self._causes)
        self._signal, self._heard = event.number, time.monotonic()
        if again:
            _say("asked again: ending all ranks at once")
            self._stop("kill", (_KILL_SECONDS, "abandon"))
        else:
            name = signal.Signals(event.number).name
            _say(f"{name}: asking all ranks to stop with a checkpoint; the same again ends them at once")
            self._stop("term", (self._stop_seconds, "kill"), (_KILL_SECONDS, "abandon"))

    def _verdict(self) -> int:
        if not self._causes:
            return 0
        if self._causes[0].code == PREEMPTED:
            _say("preempted, with a checkpoint written; the same command goes on from there")
            return PREEMPTED
        cause = max(self._causes, key=lambda cause: cause.weight)
        _say(cause.words)
        if self._signal:
            return 128 + (signal.SIGINT if self._signal == signal.SIGINT else signal.SIGTERM)
        return cause.code if cause.code == 2 else 1


def print_line(event: Event) -> bool:
    """What a rank or a host wrote, with its name. Whether anybody reads it."""
    where = f"{event.rank} {event.host}" if event.rank >= 0 else event.host
    try:
        print(f"[{where}] {event.text}", file=getattr(sys, event.stream), flush=True)
        return True
    except OSError:
        sys.stdout = sys.stderr = open("/dev/null", "w")  # noqa: SIM115
        return False


def why_lost(event: Event) -> str:
    """Of a connection that has ended."""
    return event.text or (
        "the connection broke" if event.number == _SSH_FAILED else f"its agent {_ending(event.number)}"
    )


def _ending(code: int) -> str:
    if code < 0:
        return f"was ended by signal {-code} ({signal.strsignal(-code)})"
    return f"ended with exit code {code}"


def _say(message: str) -> None:
    with contextlib.suppress(OSError):
        print(f"launch/cluster.sh: {message}", file=sys.stderr, flush=True)
