"""The records of a run as lines of JSON."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from job.distributed.comm import Comm
from job.errors import JobError
from job.monitoring.recorder import Recorder
from job.monitoring.records import JsonLines, Summary
from job.monitoring.writers import open_writers
from tests.examples import TEST, TRAIN


def test_json_lines_are_there_as_soon_as_they_are_written(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    writer = JsonLines(file)
    writer.write(TRAIN)
    assert [json.loads(line) for line in file.read_text().splitlines()] == [TRAIN]
    writer.write(TEST)
    assert [json.loads(line) for line in file.read_text().splitlines()] == [TRAIN, TEST]
    assert file.read_text().endswith("}\n")
    writer.close()


def test_what_a_checkpoint_counts_on_is_forced_to_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: forced.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    with open_writers(tmp_path, Comm(), 235) as writers:
        Recorder(writers).sync()
    assert forced.count(str(tmp_path / "metrics.jsonl")) == 1


def test_json_lines_are_added_to_those_of_before(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    for record in (TRAIN, TEST):
        writer = JsonLines(file, last_step=10)
        writer.write(record)
        writer.close()
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [10, 235]


def test_every_line_is_json_for_any_reader_though_the_loss_is_not_a_number(tmp_path: Path) -> None:
    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is not JSON")

    writer = JsonLines(tmp_path / "metrics.jsonl")
    writer.write({**TRAIN, "loss": float("nan"), "pace": {"compute_seconds": [1.5, float("inf")]}})
    writer.close()
    read = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert (read["loss"], read["pace"]) == (None, {"compute_seconds": [1.5, None]})


def test_records_after_the_step_that_is_gone_on_from_are_removed_and_half_a_line_too(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 5}\n{"step": 6}\n{"step": 6, "split": "test"}\n{"step": 7}\n{"step": 8, "lo')
    writer = JsonLines(file, last_step=6)
    writer.write({**TRAIN, "step": 7})
    writer.close()
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [5, 6, 6, 7]


@pytest.mark.parametrize(
    "line", [b'{"step": 6, "lo', b"\x00\x00\x00", b"\xff\xfe", b"[]", b'{"loss": 1}', b"7", b'{"step": "six"}']
)
def test_a_damaged_line_amid_the_records_is_named_and_nothing_is_lost(tmp_path: Path, line: bytes) -> None:
    file = tmp_path / "metrics.jsonl"
    content = b'{"step": 5}\n' + line + b'\n{"step": 7}\n'
    file.write_bytes(content)
    with pytest.raises(JobError, match=r"metrics\.jsonl, line 2: damaged.*delete that line"):
        JsonLines(file, last_step=6)
    assert file.read_bytes() == content


def test_the_summary_is_json_for_any_reader_though_the_loss_is_not_a_number(tmp_path: Path) -> None:
    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is not JSON")

    Summary(tmp_path).finish({"test_loss": float("nan"), "all": (1.5, float("-inf"))})
    read = json.loads((tmp_path / "summary.json").read_text(), parse_constant=refuse)
    assert read == {"test_loss": None, "all": [1.5, None]}
