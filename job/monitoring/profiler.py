"""Where the time of a few steps goes: ``run.profile_steps=100-110`` (docs/profiling.md says how to read it).

Each rank writes what MXNet ran in these steps, rank 0 also what Horovod did, and rank 0 prints a summary of all ranks.
From the start of the first step to the end of the last one's last operator, every instant of a rank is counted once,
as the first of these that it is part of:

compute    an operator of MXNet runs; a custom operator (SyncBatchNorm is one) not while it waits in a collective
allreduce  a collective is under way that all ranks have entered
wait       a collective is under way that another rank has not entered yet
input      the feed is making a batch
rest       nothing of that: Python between the operators, handing over to a thread, the console, a checkpoint

So the parts add up to the whole, and all but the first are what computing does not hide. No clocks of two ranks are
compared: a collective ends for all ranks together, and the one that comes last never waits, so that the time of its
allreduce is the shortest time that any rank spent in it, and what another rank spent beyond that was waiting.
"""

from __future__ import annotations

import json
import os
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Optional

import mxnet as mx
import numpy as np

from job.config import Config
from job.distributed.comm import Comm
from job.errors import Preempted
from job.run_dir import PROFILE, write_whole
from job.training.learner import Learner

PARTS = ("compute", "wait", "allreduce", "input", "rest")
_OURS = "job"  # the category of what is not MXNet's own in a trace
_TRACKS = {
    "kernel": "operators", "custom": "custom operators", "collective": "collectives", "blocked": "collectives",
    "input": "Python", "other": "Python",
}  # fmt: skip


class Profiler:
    """Profiles the steps that the configuration names, once, and costs nothing in all others. All ranks use it alike.

    When its block ends before the last of these steps, it profiles those that there were; if it ends by an error,
    it leaves what it has.
    """

    def __init__(self, config: Config, comm: Comm, learner: Learner) -> None:
        self._steps = config.run.profiled
        self._folder = config.run.dir / PROFILE
        self._comm = comm
        self._learner = learner
        self._profiled: list[int] = []
        self._running = False

    def __enter__(self) -> Profiler:
        return self

    def __exit__(
        self, kind: Optional[type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        if kind is not None and not issubclass(kind, Preempted):
            return
        if self._running:
            self._finish()
        elif self._steps and not self._profiled:
            self._tell(f"warning: run.profile_steps={_text(self._steps)} was not reached: nothing was profiled")

    def step(self, number: int) -> AbstractContextManager[None]:
        """What the step of this number, counted from 1, has to run in."""
        return self._profile(number) if number in self._steps else nullcontext()

    @contextmanager
    def _profile(self, number: int) -> Iterator[None]:
        if not self._running and not self._start(range(number, self._steps.stop)):
            self._steps = range(0)
            yield
            return
        with _mark(f"step {number}"):
            yield
        self._profiled.append(number)
        if number == self._steps[-1]:
            self._finish()

    def _start(self, steps: range) -> bool:
        name = f"steps-{_text(steps)}"
        self._own_trace = self._folder / f"{name}.rank{self._comm.rank}.json"
        self._raw_trace = self._own_trace.with_suffix(".raw")
        self._timeline: Optional[Path] = self._folder / f"{name}.horovod.json"
        obstacles = self._comm.gather_text(self._obstacle(), "profile files")
        if any(obstacles):
            self._tell(f"warning: steps {_text(steps)} are not profiled: {next(filter(None, obstacles))}")
            return False
        with self._comm.guard("before the profiled steps"):
            mx.nd.waitall()
        # Without the C API and the memory pool, which would be ten times as much and as slow.
        options = {"profile_symbolic": True, "profile_imperative": True, "profile_api": False, "profile_memory": False}
        mx.profiler.set_config(filename=str(self._raw_trace), **options)
        if not self._comm.start_timeline(self._timeline):
            self._timeline = None
        self._comm.barrier("profile")
        mx.profiler.set_state("run")
        self._feed = self._learner.feed
        self._learner.feed = _MarkedFeed(self._feed)  # type: ignore[assignment]
        self._running, self._started = True, _now()
        return True

    def _obstacle(self) -> str:
        """What keeps this rank from writing its files; nothing if the text is empty."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            return f"{self._folder} cannot be made: {error.strerror}"
        if self._own_trace.exists():
            return f"{self._own_trace} is there already"
        return "" if os.access(self._folder, os.W_OK) else f"{self._folder} cannot be written"

    def _finish(self) -> None:
        with self._comm.guard("the profiled steps"):
            mx.nd.waitall()
        window = (self._started, _now())
        self._running = False
        self._learner.feed = self._feed
        mx.profiler.set_state("stop")
        mx.profiler.dump()
        self._comm.stop_timeline()
        spans, problem = [], ""
        try:
            spans = read_spans(self._raw_trace)
            write_spans(self._own_trace, spans, self._comm.rank)
            self._raw_trace.unlink()
        except (OSError, ValueError, KeyError) as error:
            problem = f"{self._own_trace} cannot be written: {error!r}"
        parts = _parts_of_all_ranks(spans, window, problem, self._comm)
        if isinstance(parts, str):
            self._tell(f"warning: no summary of the profiled steps: {parts}")
        else:
            self._tell(*_summary(self._profiled, parts), *self._where())

    def _where(self) -> list[str]:
        own = self._own_trace.name.replace("rank0", "rank*" if self._comm.size > 1 else "rank0")
        timeline = self._timeline or (
            "none, as HOROVOD_TIMELINE names another" if self._comm.size > 1 else "none, with one rank"
        )
        return [
            f"MXNet's trace: {self._own_trace.with_name(own)}",
            f"Horovod's timeline: {timeline}",
            "to see them: chrome://tracing or https://ui.perfetto.dev; what the lines mean: docs/profiling.md",
        ]

    def _tell(self, *lines: str) -> None:
        if self._comm.rank == 0:
            print("\n".join(f"profile: {line}" for line in lines), flush=True)


class Span(NamedTuple):
    """Something that went on in a thread from ``start`` to ``end``, both in microseconds since 1970."""

    category: str
    name: str
    thread: int
    start: int
    end: int


def read_spans(trace: Path) -> list[Span]:
    """What is in a trace as MXNet writes it: its operators, and our own marks.

    Raises:
        ValueError, KeyError: the file is not such a trace.
    """
    events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    begins, ends = ([event for event in events if event["ph"] == kind] for kind in "be")
    if [event["name"] for event in begins] != [event["name"] for event in ends]:  # MXNet writes them pair by pair
        raise ValueError("its events do not come in pairs")
    return [Span(b["cat"], b["name"], b["tid"], b["ts"], e["ts"]) for b, e in zip(begins, ends)]


def write_spans(trace: Path, spans: Sequence[Span], rank: int) -> None:
    """Write a trace that viewers understand: MXNet's own numbers threads by 64-bit hashes, which Perfetto refuses."""
    tracks: dict[tuple[str, int], int] = {}
    events: list[dict[str, Any]] = [_named("process", rank, 0, f"rank {rank}")]
    for span in sorted(spans, key=lambda span: (span.start, -span.end)):
        kind = _TRACKS[_kind(span)]
        if (kind, span.thread) not in tracks:
            tracks[kind, span.thread] = len(tracks) + 1
            events.append(_named("thread", rank, len(tracks), kind))
        times = {"ts": span.start, "dur": span.end - span.start, "pid": rank, "tid": tracks[kind, span.thread]}
        events.append({"ph": "X", "cat": span.category, "name": span.name or "?", **times})
    write_whole(trace, json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}, allow_nan=False))


def _named(what: str, process: int, thread: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": f"{what}_name", "pid": process, "tid": thread, "args": {"name": name}}


def split_time(spans: Sequence[Span], window: tuple[int, int], shortest: Sequence[float]) -> dict[str, float]:
    """The microseconds of ``window`` that each of ``PARTS`` takes; the module says how an instant is counted.

    Args:
        spans: of this rank.
        window: from where to where.
        shortest: of each of :func:`collectives`, the shortest time that any rank spent in it, in microseconds.
    """
    kinds: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for span in spans:
        kinds[_kind(span)].append((span.start, span.end))
    for span, microseconds in zip(collectives(spans), shortest):
        kinds["wait"].append((span.start, span.end - microseconds))
        kinds["allreduce"].append((span.end - microseconds, span.end))
    points = np.unique(np.clip(np.concatenate([[window], *kinds.values()]), *window))
    during = {kind: _covered(np.array(intervals), points[:-1]) for kind, intervals in kinds.items()}
    nothing = np.zeros(len(points) - 1, bool)
    kernels, custom, blocked = (during.get(kind, nothing) for kind in ("kernel", "custom", "blocked"))
    during["compute"] = kernels | (custom & ~blocked)
    parts, left = dict.fromkeys(PARTS, 0.0), ~nothing
    for part in ("compute", "allreduce", "wait", "input"):
        mask = left & during.get(part, nothing)
        parts[part] = float(np.diff(points)[mask].sum())
        left &= ~mask
    parts["rest"] = float(np.diff(points)[left].sum())
    return parts


def collectives(spans: Sequence[Span]) -> list[Span]:
    """The spans that are collectives, in an order that is the same on all ranks."""
    return sorted((span for span in spans if _kind(span) in ("collective", "blocked")), key=lambda s: (s.name, s.start))


def _kind(span: Span) -> str:
    """kernel, custom (all of a custom operator), collective, blocked (a collective inside of one), input, other."""
    if span.category == _OURS:
        return "input" if span.name == "input" else "other"
    inside, _, name = span.name.rpartition("::")
    if name.startswith("horovod_"):
        return "blocked" if inside else "collective"
    return "custom" if inside and name == "pure_python" else "kernel"


def _covered(intervals: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Whether each point lies in one of the intervals (n, 2), whose ends do not belong to them."""
    starts, ends = np.sort(intervals, axis=0).T
    return np.searchsorted(starts, points, "right") > np.searchsorted(ends, points, "right")


def _parts_of_all_ranks(spans: list[Span], window: tuple[int, int], problem: str, comm: Comm) -> np.ndarray | str:
    """The seconds of each rank and part, (ranks, parts), on all ranks; or why they cannot be told."""
    own = collectives(spans)
    counts = comm.gather_text(problem or str(len(own)), "profiled collectives")
    if not all(count.isdigit() for count in counts):
        return next(count for count in counts if not count.isdigit())
    if len(set(counts)) > 1:
        return f"the ranks took part in {', '.join(counts)} collectives"
    durations = _table([span.end - span.start for span in own], "profiled durations", comm)
    parts = split_time(spans, window, durations.min(axis=0))
    return _table([parts[part] / 1e6 for part in PARTS], "profiled parts", comm)


def _table(row: Sequence[float], name: str, comm: Comm) -> np.ndarray:
    """The row of each rank, (ranks, len(row)), on all ranks."""
    table = np.zeros((comm.size, len(row)))
    table[comm.rank] = row
    return comm.sum(table, name) if row else table


def _summary(steps: Sequence[int], seconds: np.ndarray) -> list[str]:
    """A table of milliseconds a step, from the seconds of each rank and part, (ranks, parts)."""
    ranks = len(seconds)
    rows = 1e3 * np.column_stack([seconds, seconds.sum(axis=1)]) / len(steps)  # (ranks, parts and the whole)
    mean, most = rows.mean(axis=0), rows.argmax(axis=0)
    title = f"steps {_text(steps)} on {ranks} rank{'s' * (ranks > 1)}, in ms a step"
    lines = [title + ": mean, share, and the rank with most" * (ranks > 1)]
    for index, part in enumerate((*PARTS, "whole")):
        line = f"{part:<10}{mean[index]:9.2f}{mean[index] / mean[-1]:8.1%}"
        lines.append(line + f"{rows[most[index], index]:9.2f} (rank {most[index]})" * (ranks > 1))
    return lines


def _text(steps: Sequence[int]) -> str:
    return f"{steps[0]}-{steps[-1]}" if len(steps) > 1 else str(steps[0])


class _MarkedFeed:
    """A feed whose work shows in the trace."""

    def __init__(self, feed: Any) -> None:
        self._feed = feed

    def __call__(self, *arguments: Any) -> Any:
        with _mark("input"):
            return self._feed(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._feed, name)


@cache
def _domain() -> mx.profiler.Domain:
    return mx.profiler.Domain(_OURS)


@contextmanager
def _mark(name: str) -> Iterator[None]:
    """Show the block in MXNet's trace."""
    task = mx.profiler.Task(_domain(), name)
    task.start()
    try:
        yield
    finally:
        task.stop()


def _now() -> int:
    return time.time_ns() // 1000  # the clock of MXNet's traces
