"""What a run has left in its folder, read back: the records, and the configuration and the summary where they are.

A run may still be going on. Then the summary is missing, and the last line of the records may be half written.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, Optional

import yaml

from job.errors import UsageError
from job.monitoring.records import Record
from job.run_dir import CHANGES, CONFIG, DATASET, METRICS, SUMMARY

NUMBERS = ("loss", "accuracy", "learning_rate", "images_per_second")  # what is read of a record beside the counts


class Span(NamedTuple):
    """The steps after ``start``, up to ``end``, which that many ranks took. None: the records do not say."""

    ranks: Optional[int]
    start: int
    end: int


class Change(NamedTuple):
    """Ranks died or could run again, and others went on after ``step``: a line of changes.jsonl."""

    step: int
    ranks_before: int
    ranks: int
    why: str
    replayed_steps: int
    lost_seconds: float
    hosts: Optional[Mapping[str, int]] = None  # with how many ranks each; None on one machine

    def __str__(self) -> str:
        where = " on " + ", ".join(f"{host} ({ranks})" for host, ranks in self.hosts.items()) if self.hosts else ""
        return (
            f"{self.ranks_before} ranks, then {self.ranks}{where}: {self.why};"
            f" {self.replayed_steps} steps computed again, {self.lost_seconds:g} s lost"
        )


@dataclass(frozen=True)
class History:
    """One run: its name, its records in the order of their steps, and what else its folder holds."""

    name: str
    records: Sequence[Record]
    config: dict[str, Any]  # by dotted key; empty where there is no config.yaml
    summary: dict[str, Any]  # empty until the run is complete
    notes: Sequence[str] = ()
    data: dict[str, Any] = field(default_factory=dict)  # as dataset.json describes it
    changes: Sequence[Change] = ()  # in their order

    def of(self, split: str) -> list[Record]:
        """The records of the training ("train") or of the evaluations ("validation", "test")."""
        return [record for record in self.records if record["split"] == split]

    def series(self, split: str, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of ``key``, NaN for a value that was not finite; records without it are left out."""
        points = [(record["step"], number(record[key])) for record in self.of(split) if key in record]
        return [step for step, _ in points], [value for _, value in points]

    def spans(self) -> list[Span]:
        """The numbers of ranks in turn. A record speaks for the steps since the one before it."""
        spans: list[Span] = []
        for ranks, records in groupby(self.records, key=lambda record: record.get("ranks")):
            spans.append(Span(ranks, spans[-1].end if spans else 0, max(record["step"] for record in records)))
        return spans

    def evaluations(self) -> list[Record]:
        """The records that hold an accuracy, of the split that the run is judged by."""
        return [record for record in self.of(self.judged_by) if record.get("accuracy") is not None]

    @property
    def judged_by(self) -> str:
        """``validation`` if the run holds out a part of its training set, ``test`` if not."""
        return "validation" if self.of("validation") else "test"

    def last(self, key: str, split: str = "test") -> Optional[Any]:
        """``key`` of the last record of a split that has it, None if none has."""
        return next((record[key] for record in reversed(self.of(split)) if record.get(key) is not None), None)


def number(value: Optional[float]) -> float:
    """A value of a record. JSON has no NaN: what was not finite is null there."""
    return math.nan if value is None else float(value)


def read_runs(folders: Sequence[Path]) -> list[History]:
    """Read each folder. A run is called by the folder's name, or by its whole path where two names are the same.

    Raises:
        UsageError: a folder is not that of a run, or what it holds is not what a run writes there.
    """
    whole = [folder.resolve() for folder in folders]
    for folder, path in zip(folders, whole):
        if whole.count(path) > 1:
            raise UsageError(f"{folder}: given twice")
    names = [path.name for path in whole]
    try:
        return [
            _read_run(folder, name if names.count(name) == 1 else str(folder)) for folder, name in zip(folders, names)
        ]
    except OSError as error:
        raise UsageError(
            f"{error.filename}: cannot be read: {error.strerror}; mend the name or the permissions"
        ) from None


def _read_run(folder: Path, name: str) -> History:
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder; give the run.dir of a run")
    if not (folder / METRICS).is_file():
        runs = sorted(str(file.parent) for file in folder.glob(f"*/{METRICS}"))
        raise UsageError(
            f"{folder}: holds no {METRICS}, so it is not the folder of a run"
            + (f"; did you mean {' '.join(runs[:5])}{' ...' if len(runs) > 5 else ''}?" if runs else "")
        )
    notes: list[str] = []
    records = list(_records(folder / METRICS, notes))
    if not records:
        raise UsageError(f"{folder / METRICS}: holds no record yet; wait for the run's first ones")
    data = _mapping(folder / DATASET, json.loads)
    config = dict(_flat(_mapping(folder / CONFIG, yaml.safe_load)))
    changes = list(read_changes(folder / CHANGES, notes))
    return History(name, records, config, _mapping(folder / SUMMARY, json.loads), notes, data, changes)


def read_changes(file: Path, notes: list[str]) -> Iterator[Change]:
    """The lines of changes.jsonl; ``notes`` gets a sentence for each that is none."""
    for number, line in enumerate(_text(file).splitlines() if file.exists() else (), 1):
        try:
            yield Change(**json.loads(line))
        except (ValueError, TypeError):
            notes.append(f"{file}: line {number} is no change of ranks and was left out")


def _records(file: Path, notes: list[str]) -> Iterator[Record]:
    lines = _text(file).splitlines(keepends=True)
    for index, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError:
            if index == len(lines) and not line.endswith("\n"):
                notes.append(f"{file}: line {index} is only half written and was left out; the run may be going on")
                return
            raise UsageError(f"{file}, line {index}: not JSON: {line.strip()[:60]!r}") from None
        if complaint := _complaint(record):
            raise UsageError(f"{file}, line {index}: {complaint}")
        yield record


def _complaint(record: Any) -> Optional[str]:
    """What makes this no record, None if it is one. Keys that are not read may hold anything."""
    if not isinstance(record, dict):
        return "not a record, which is a JSON object"
    if not (_is_whole(record.get("step")) and record.get("split") in ("train", "validation", "test")):
        return "not a record, which has a step (a whole number) and a split (train, validation or test)"
    for key in NUMBERS:
        value = record.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            return f"{key} is not a number: {value!r}"
    if "ranks" in record and not (_is_whole(record["ranks"]) and record["ranks"] > 0):
        return f"ranks is not a number of ranks: {record['ranks']!r}"
    rows = record.get("confusion", [])
    if not isinstance(rows, list) or not all(
        isinstance(row, list) and len(row) == len(rows) and all(map(_is_whole, row)) for row in rows
    ):
        return "confusion is not a square of whole numbers"
    return None


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def _mapping(file: Path, load: Callable[[str], Any]) -> dict[str, Any]:
    """The names and values that a file holds, none if there is no such file."""
    if not file.exists():
        return {}
    try:
        values = load(_text(file))
    except (ValueError, yaml.YAMLError) as error:
        raise UsageError(f"{file}: cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UsageError(f"{file}: should hold names and values")
    return values


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file}: cannot be read: {error}") from None


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
