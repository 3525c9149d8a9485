"""Runs read back: what a run may leave in its folder, whole or cut short, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from job.errors import UsageError
from job.monitoring.history import Span, read_runs


def record(step: int, split: str = "train", **more: Any) -> dict[str, Any]:
    return {"step": step, "epoch": 0, "split": split, "loss": 1.0, "accuracy": 0.5, **more}


def folder(path: Path, *records: dict[str, Any], tail: str = "") -> Path:
    path.mkdir(parents=True)
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + tail)
    return path


def test_the_numbers_of_ranks_are_spans_that_cover_every_step_once(tmp_path: Path) -> None:
    ranks = [2, 2, 4, 4, 1]
    run = folder(tmp_path / "run", *(record(10 * (place + 1), ranks=rank) for place, rank in enumerate(ranks)))
    spans = read_runs([run])[0].spans()
    assert spans == [Span(2, 0, 20), Span(4, 20, 40), Span(1, 40, 50)]


def test_an_old_record_without_ranks_is_a_span_of_unknown_ranks(tmp_path: Path) -> None:
    run = folder(tmp_path / "run", record(10), record(10, "test"), record(20, ranks=2))
    assert read_runs([run])[0].spans() == [Span(None, 0, 10), Span(2, 10, 20)]


def test_a_value_that_was_not_finite_is_nan_and_one_that_is_not_there_is_left_out(tmp_path: Path) -> None:
    run = folder(tmp_path / "run", record(1), record(2, loss=None), {"step": 3, "split": "train"})
    steps, losses = read_runs([run])[0].series("train", "loss")
    assert steps == [1, 2] and losses[0] == 1.0 and math.isnan(losses[1])


@pytest.mark.parametrize("tail", ['{"step": 2, "ep', '{"step": 2', "{", '{"step": 2, "loss": "a'])
def test_half_a_last_line_is_left_out_and_told(tmp_path: Path, tail: str) -> None:
    history = read_runs([folder(tmp_path / "run", record(1), tail=tail)])[0]
    assert [record["step"] for record in history.records] == [1]
    assert len(history.notes) == 1 and "line 2" in history.notes[0]


def test_a_whole_last_line_without_its_newline_counts(tmp_path: Path) -> None:
    history = read_runs([folder(tmp_path / "run", record(1), tail=json.dumps(record(2)))])[0]
    assert [record["step"] for record in history.records] == [1, 2] and not history.notes


@pytest.mark.parametrize(
    "line, words",
    [
        ('{"step": 2, "ep\n', "not JSON"),
        ("[1, 2]\n", "not a record"),
        ('{"step": 2}\n', "not a record"),
        ('{"step": "2", "split": "train"}\n', "not a record"),
        ('{"step": true, "split": "train"}\n', "not a record"),
        ('{"step": 2, "split": "dev"}\n', "not a record"),
        ('{"step": 2, "split": "train", "loss": "low"}\n', "loss is not a number: 'low'"),
        ('{"step": 2, "split": "train", "ranks": 0}\n', "ranks is not a number of ranks: 0"),
        ('{"step": 2, "split": "test", "confusion": [[1, 2]]}\n', "confusion is not a square"),
        ('{"step": 2, "split": "test", "confusion": [[1, 2], [3, -4]]}\n', "confusion is not a square"),
        ('{"step": 2, "split": "test", "confusion": 7}\n', "confusion is not a square"),
    ],
)
def test_a_malformed_line_is_refused_by_file_and_number(tmp_path: Path, line: str, words: str) -> None:
    run = folder(tmp_path / "run", record(1), tail=line + json.dumps(record(3)) + "\n")
    with pytest.raises(UsageError) as refused:
        read_runs([run])
    assert f"{run / 'metrics.jsonl'}, line 2: " in str(refused.value) and words in str(refused.value)


def test_a_malformed_last_line_that_was_written_to_its_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="line 2: not JSON"):
        read_runs([folder(tmp_path / "run", record(1), tail='{"step": 2, "ep\n')])


def test_a_folder_without_metrics_is_refused_and_the_runs_in_it_are_named(tmp_path: Path) -> None:
    folder(tmp_path / "runs" / "one", record(1))
    with pytest.raises(UsageError, match=r"holds no metrics.jsonl.*did you mean .*runs/one\?"):
        read_runs([tmp_path / "runs"])
    with pytest.raises(UsageError, match="no such folder"):
        read_runs([tmp_path / "nowhere"])


@pytest.mark.parametrize("name, text", [("config.yaml", "a: [1"), ("config.yaml", "- 1"), ("summary.json", "{")])
def test_a_configuration_or_summary_that_cannot_be_read_is_refused_by_name(
    tmp_path: Path, name: str, text: str
) -> None:
    run = folder(tmp_path / "run", record(1))
    (run / name).write_text(text)
    with pytest.raises(UsageError, match=str(run / name)):
        read_runs([run])


def test_bytes_that_are_not_text_and_files_without_records_are_refused(tmp_path: Path) -> None:
    run = folder(tmp_path / "run")
    with pytest.raises(UsageError, match="no record yet"):
        read_runs([run])
    (run / "metrics.jsonl").write_bytes(b"\xff\xfe\n")
    with pytest.raises(UsageError, match="cannot be read"):
        read_runs([run])


def test_runs_are_called_by_their_folder_and_by_their_path_where_two_are_alike(tmp_path: Path) -> None:
    folders = [folder(tmp_path / name, record(1)) for name in ("a/same", "b/same", "b/other")]
    assert [run.name for run in read_runs(folders)] == [str(folders[0]), str(folders[1]), "other"]
    with pytest.raises(UsageError, match="given twice"):
        read_runs([folders[0], tmp_path / "b" / ".." / "a" / "same"])


def test_a_folder_that_cannot_be_looked_at_is_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read: File name too long"):
        read_runs([tmp_path / ("x" * 300)])
