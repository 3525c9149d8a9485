"""Where metrics go: read back with each format's own reader."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from job.comm import Comm
from job.writers import JsonLines, PlainConsole, TensorBoard, open_writers

ROOT = Path(__file__).resolve().parents[2]
TRAIN = {
    "step": 10,
    "epoch": 0,
    "split": "train",
    "loss": 0.68604,
    "accuracy": 0.739,
    "learning_rate": 0.2,
    "images_per_second": 21000.4,
}
TEST = {
    "step": 235,
    "epoch": 0,
    "split": "test",
    "loss": 0.5,
    "accuracy": 0.837,
    "examples": 10_000,
    "train_loss": 0.25,
    "train_accuracy": 0.9,
}
SUMMARY = {"test_accuracy": 0.83704, "test_loss": 0.5, "steps": 235, "images_per_second": 21000.4, "ranks": 2}
TRAIN_LINE = "epoch 0 train loss 0.6860 accuracy 0.7390 21000 images/s"
TEST_LINE = "epoch 0 test loss 0.5000 accuracy 0.8370 (train loss 0.2500 accuracy 0.9000)"
DONE_LINE = "done: test accuracy 0.8370, loss 0.5000 after 235 steps (21000 images/s on 2 ranks); all of it is in "

# A run as train.py's, in a process of its own whose standard output the test chooses.
SCRIPT = f"""
import sys
from pathlib import Path
from job.comm import Comm
from job.writers import open_writers
with open_writers(Path(sys.argv[1]), Comm(), 235) as writers:
    for record in ({TRAIN}, {TEST}):
        for writer in writers:
            writer.write(record)
    for writer in writers:
        writer.finish({SUMMARY})
"""


class Ranks(Comm):
    def __init__(self, rank: int, size: int) -> None:
        super().__init__()
        self.rank, self.size = rank, size


def environment(**changes: str) -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if name not in ("FORCE_COLOR", "NO_COLOR", "COLUMNS")}
    return {**own, "PYTHONPATH": str(ROOT), "TERM": "xterm", **changes}


def piped(folder: Path, **changes: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder)],
        env=environment(**changes),
        check=True,
        stdout=subprocess.PIPE,
        timeout=60,
    ).stdout.decode()


def on_terminal(folder: Path, columns: int) -> str:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(folder)], env=environment(), stdout=theirs)
    os.close(theirs)
    output = b""
    while chunk := read_terminal(ours):
        output += chunk
    assert process.wait(timeout=60) == 0
    os.close(ours)
    return output.decode()


def read_terminal(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 4096)
    except OSError:  # what Linux answers when the other side has closed
        return b""


def visible(output: str) -> list[str]:
    return [re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", line).strip() for line in re.split(r"[\r\n]+", output)]


def test_json_lines_are_there_as_soon_as_they_are_written(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    writer = JsonLines(file)
    writer.write(TRAIN)
    assert [json.loads(line) for line in file.read_text().splitlines()] == [TRAIN]
    writer.write(TEST)
    assert [json.loads(line) for line in file.read_text().splitlines()] == [TRAIN, TEST]
    assert file.read_text().endswith("}\n")
    writer.close()


def test_json_lines_are_added_to_those_of_before(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    for record in (TRAIN, TEST):
        writer = JsonLines(file, last_step=10)
        writer.write(record)
        writer.close()
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [10, 235]


def test_tensorboard_reads_every_scalar_at_its_step(tmp_path: Path) -> None:
    writer = TensorBoard(tmp_path)
    for record in (TRAIN, {**TRAIN, "step": 20, "loss": 0.5}, TEST):
        writer.write(record)
    writer.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    read = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert {tag: [step for step, _ in points] for tag, points in read.items()} == {
        "train/epoch": [10, 20],
        "train/loss": [10, 20],
        "train/accuracy": [10, 20],
        "optimizer/learning_rate": [10, 20],
        "throughput/images_per_second": [10, 20],
        "test/epoch": [235],
        "test/loss": [235],
        "test/accuracy": [235],
        "test/examples": [235],
        "test/train_loss": [235],
        "test/train_accuracy": [235],
    }
    values = {tag: points[-1][1] for tag, points in read.items()}
    assert read["train/loss"][0][1] == pytest.approx(0.68604, rel=1e-7)  # event files hold float32
    assert values["train/loss"] == 0.5
    assert values["optimizer/learning_rate"] == pytest.approx(0.2, rel=1e-7)
    assert values["throughput/images_per_second"] == pytest.approx(21000.4, rel=1e-7)
    assert (values["test/examples"], values["test/train_loss"]) == (10_000, 0.25)


def test_console_lines_can_be_searched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    console = PlainConsole(tmp_path, 235)
    console.write(TRAIN)
    console.write(TEST)
    console.finish(SUMMARY)
    assert capsys.readouterr().out.splitlines() == [
        f"step 10/235 {TRAIN_LINE}",
        f"step 235/235 {TEST_LINE}",
        f"{DONE_LINE}{tmp_path}",
    ]


def test_one_rank_is_not_many(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    PlainConsole(tmp_path, 235).finish({**SUMMARY, "ranks": 1})
    assert "on 1 rank)" in capsys.readouterr().out


def test_rank_0_writes_all_four_and_the_summary_only_at_the_end(tmp_path: Path) -> None:
    with open_writers(tmp_path, Ranks(0, 2), 235) as writers:
        for writer in writers:
            writer.write(TEST)
        assert sorted(file.name for file in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]
        for writer in writers:
            writer.finish(SUMMARY)
    assert json.loads((tmp_path / "summary.json").read_text()) == SUMMARY
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [TEST]


def test_a_run_that_fails_leaves_its_metrics_and_no_summary(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), open_writers(tmp_path, Comm(), 235) as writers:
        for writer in writers:
            writer.write(TRAIN)
        raise ZeroDivisionError
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == TRAIN
    assert EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("train/loss")[0].step == 10
    assert not (tmp_path / "summary.json").exists()


@pytest.mark.parametrize("rank", [1, 3])
def test_other_ranks_write_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str], rank: int) -> None:
    with open_writers(tmp_path, Ranks(rank, 4), 235) as writers:
        assert writers == []
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_a_pipe_receives_plain_lines_without_escape_codes(tmp_path: Path) -> None:
    assert piped(tmp_path).splitlines() == [
        f"step 10/235 {TRAIN_LINE}",
        f"step 235/235 {TEST_LINE}",
        f"{DONE_LINE}{tmp_path}",
    ]


def test_a_terminal_of_80_columns_shows_progress_in_one_line_and_keeps_what_matters(tmp_path: Path) -> None:
    lines = visible(on_terminal(tmp_path, columns=80))
    kept = (f"step 235/235 {TEST_LINE}", f"{DONE_LINE}{tmp_path}")
    for line in kept:
        assert line in lines  # whole: a terminal breaks long lines itself, and copies them unbroken
    progress = [line for line in lines if line not in kept]
    assert any(TRAIN_LINE in line for line in progress)
    assert max(map(len, progress)) <= 80
    assert "step 10/235" not in "\n".join(lines)


def test_ranks_of_a_job_never_draw_a_progress_bar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)  # as under horovodrun, which prefixes each line
    with open_writers(tmp_path, Ranks(0, 2), 235) as writers:
        assert type(writers[-1]) is PlainConsole
    assert capsys.readouterr().out == ""


def test_a_folder_in_brackets_is_shown_as_it_is_called(tmp_path: Path) -> None:
    folder = tmp_path / "lr[bold]"
    folder.mkdir()
    assert f"{DONE_LINE}{folder}" in visible(on_terminal(folder, columns=80))


def test_a_pipe_receives_plain_lines_where_colours_are_forced(tmp_path: Path) -> None:
    assert "\x1b" not in piped(tmp_path, FORCE_COLOR="1")


def test_every_line_is_json_for_any_reader_though_the_loss_is_not_a_number(tmp_path: Path) -> None:
    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is not JSON")

    writer = JsonLines(tmp_path / "metrics.jsonl")
    writer.write({**TRAIN, "loss": float("nan")})
    writer.close()
    json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)


def test_records_after_the_step_that_is_gone_on_from_are_removed_and_half_a_line_too(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 5}\n{"step": 6}\n{"step": 6, "split": "test"}\n{"step": 7}\n{"step": 8, "lo')
    writer = JsonLines(file, last_step=6)
    writer.write({**TRAIN, "step": 7})
    writer.close()
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [5, 6, 6, 7]
