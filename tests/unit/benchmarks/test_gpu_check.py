"""The command for whoever has a GPU, without one: what it finds, and what its table says of what went wrong."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import mxnet as mx
import numpy as np
import pytest

from benchmarks import gpu_check
from benchmarks.gpu_check import FAILED, MEASURED, NOT_RUN, OK, SMALL_SHAPES, TOLERANCE, WRONG, Place, Row
from job.fitness import facts
from job.operators import tried_passes
from job.operators.graphs import Graphs
from tests.cuda import queued


def agreement(passes: Any, dtype: str = "float32") -> Row:
    return gpu_check.agreement(passes, "kernels", mx.cpu(), dtype, TOLERANCE[dtype], SMALL_SHAPES)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_kernels_that_are_right_pass(dtype: str) -> None:
    row = agreement(queued.kernels(dtype), dtype)
    assert row.verdict == OK and "the same bits again" in row.found
    assert set(row.data) == {"y", "dx", "mean", "variance", "dgamma", "dbeta"}


class Wrong(Graphs):
    """Whose method of that name is slightly off."""

    def __init__(self, name: str, place: int) -> None:
        super().__init__("float32")
        whole = getattr(self, name)

        def broken(*arguments: Any) -> Any:
            result = whole(*arguments)
            target = result if place < 0 else arguments[place]
            target += 1e-3 * (1 + mx.nd.abs(target))
            return result

        setattr(self, name, broken)


@pytest.mark.parametrize(
    ("name", "place", "where"),
    [("moments", 1, "y"), ("affine", 2, "y"), ("products", 3, "dx"), ("combine", 4, "dx"), ("statistics", -1, "")],
)
def test_a_pass_that_is_wrong_is_told(name: str, place: int, where: str) -> None:
    row = agreement(Wrong(name, place))
    assert row.verdict == WRONG
    assert not where or row.data[where] > TOLERANCE["float32"]


def test_numbers_that_are_none_are_wrong() -> None:
    class Nothing(Graphs):
        def affine(self, x: Any, saved: Any, y: Any, req: str, options: Any) -> None:
            y[:] = np.nan

    assert agreement(Nothing("float32")).verdict == WRONG


def test_other_bits_at_a_second_time_are_wrong() -> None:
    class Restless(Graphs):
        drawn = 0

        def affine(self, x: Any, saved: Any, y: Any, req: str, options: Any) -> None:
            super().affine(x, saved, y, req, options)
            Restless.drawn += 1
            y += Restless.drawn * 1e-7

    row = agreement(Restless("float32"))
    assert row.verdict == WRONG and "OTHER BITS" in row.found


def rows_of(capsys: pytest.CaptureFixture[str]) -> dict[str, Row]:
    lines = [line[len(gpu_check.MARK) :] for line in capsys.readouterr().out.splitlines() if gpu_check.MARK in line]
    return {row.what: row for row in (Row(*json.loads(line)) for line in lines)}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # MXNet's __del__ of what failed
def test_kernels_that_cannot_be_used_tell_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(mx, "gpu", mx.cpu)
    monkeypatch.setattr(tried_passes, "queued_passes", lambda ctx, dtype: tried_passes._tried_kernels(ctx, dtype))
    monkeypatch.setattr(os, "environ", {**os.environ})
    gpu_check.kernels(Place(1, False, tmp_path))
    rows = rows_of(capsys)
    assert rows["kernels, float64"].verdict == FAILED
    assert "the kernels of SyncBatchNorm cannot be used (" in rows["kernels, float64"].found
    assert rows["MXNet's operators, float64"].verdict == OK


def smoke_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], codes: dict[str, str]
) -> dict[str, Row]:
    """Of four GPUs; ``codes`` has the hash of a run, by its folder's name, or why it fails."""

    def run(command: list[str], **options: Any) -> Any:
        (folder,) = (Path(word.partition("=")[2]) for word in command if word.startswith("run.dir="))
        digest = codes[folder.name]
        folder.mkdir()
        summary = {"weights_sha256": digest, "test_accuracy": 0.7, "images_per_second": 9.0}
        (folder / "summary.json").write_text(json.dumps(summary))
        return gpu_check.subprocess.CompletedProcess(command, int(digest.startswith("error")), "", digest)

    monkeypatch.setattr(gpu_check.subprocess, "run", run)
    gpu_check.bits(Place(4, False, tmp_path))
    return rows_of(capsys)


def test_runs_with_the_same_bits_are_told_from_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    codes = {"smoke-on-1": "a", "smoke-on-1-again": "a", "smoke-on-2": "a", "smoke-on-4": "b"}
    rows = smoke_runs(monkeypatch, tmp_path, capsys, codes)
    assert (rows["repeated, the same bits"].verdict, rows["on any number, the same bits"].verdict) == (OK, WRONG)


def test_a_run_that_fails_tells_its_last_words_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    codes = {"smoke-on-1": "a", "smoke-on-1-again": "error: x\nNCCL | no", "smoke-on-2": "a", "smoke-on-4": "a"}
    rows = smoke_runs(monkeypatch, tmp_path, capsys, codes)
    assert rows["smoke run, GPUs: 1 again"][1:3] == ("NCCL | no", FAILED)
    assert rows["repeated, the same bits"].verdict == NOT_RUN
    assert rows["on any number, the same bits"].verdict == OK
    text = gpu_check.table({"GPUs": "none"}, {"bits": [*rows.values()]}, rehearse=False)
    assert "| bits | smoke run, GPUs: 1 again | NCCL / no | FAILED |" in text and "rehearsal" not in text


def test_a_part_that_does_not_end_keeps_what_it_has_told() -> None:
    output, failure = gpu_check.output_of(["sh", "-c", "echo a row; exec sleep 600"], {}, 3.0)
    assert (output, failure) == ("a row\n", "\nnot done after 3 s")


def test_bandwidth_is_that_of_each_ranks_links() -> None:
    assert gpu_check.bus_bandwidth(4, 1_000, 1e-3) == 1.5e6
    assert gpu_check.bus_bandwidth(1, 1_000, 1e-3) == 0


def test_without_a_gpu_there_is_one_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(facts, "mxnet_on_gpus", lambda: facts.Answer("", "Error: CUDA: driver too old"))
    with pytest.raises(SystemExit) as ended:
        gpu_check.main([])
    said = capsys.readouterr()
    assert (ended.value.code, said.out) == (2, "")
    assert (
        said.err.startswith("error: MXNet sees no GPU here (Error: CUDA: driver too old)") and "--rehearse" in said.err
    )


def test_the_table_is_written_with_what_it_is_made_of(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_check, "machine", lambda: {"GPUs": "none"})
    monkeypatch.setattr(gpu_check, "run_part", lambda name, place: [Row(name, f"{place.ranks}", MEASURED, [1.5])])
    assert gpu_check.main(["--rehearse", "--out", str(tmp_path)]) == 0
    table = (tmp_path / "gpu_check.md").read_text()
    assert table in capsys.readouterr().out and "rehearsal on the CPU" in table
    held = json.loads((tmp_path / "gpu_check.json").read_text())
    assert list(held["parts"]) == list(gpu_check.PARTS) and held["parts"]["step"] == [["step", "2", MEASURED, [1.5]]]
    monkeypatch.setattr(gpu_check, "run_part", lambda name, place: [Row(name, "", FAILED)])
    assert gpu_check.main(["--rehearse", "--out", str(tmp_path)]) == 1
