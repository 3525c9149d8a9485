"""The console, as a person or a log receives it: through a pipe, and on a terminal of 80 columns."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import shlex
import struct
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from job.monitoring.console import PlainConsole, TerminalConsole, clock, conclude, describe
from tests.examples import SUMMARY, TEST, TRAIN

ROOT = Path(__file__).resolve().parents[3]
TRAIN_LINE = "epoch 0 train loss 0.6860 accuracy 0.7390 21000 images/s"
TEST_LINE = "epoch 0 test loss 0.5000 accuracy 0.8370 (train loss 0.2500 accuracy 0.9000)"
LOOK_LINES = ["best: test accuracy 0.8500 after step 100", "time: 1:32 of training, evaluation not counted"]
DONE_LINE = (
    "done: test accuracy 0.8370, loss 0.5000 after 235 steps (21000 images/s on 2 ranks); weights 0123456789ab;"
    " all of it is in "
)

# A run as train.py's, in a process of its own whose standard output the test chooses.
SCRIPT = f"""
import sys
from pathlib import Path
from job.distributed.comm import Comm
from job.monitoring.writers import open_writers
with open_writers(Path(sys.argv[1]), Comm(), 235) as writers:
    for record in ({TRAIN}, {TEST}):
        for writer in writers:
            writer.write(record)
    for writer in writers:
        writer.finish({SUMMARY})
"""


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


def on_terminal(folder: Path, columns: int, **changes: str) -> str:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(folder)], env=environment(**changes), stdout=theirs)
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


def concluding(folder: Path) -> list[str]:
    use = f"use: python {os.path.relpath(ROOT / 'job' / 'export.py')} {folder}"
    return [*LOOK_LINES, f"look: tensorboard --logdir {folder}", use, f"{DONE_LINE}{folder}"]


def visible(output: str) -> list[str]:
    return [line.strip() for line in unstyled(output)]


def unstyled(output: str) -> list[str]:
    return [re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", line) for line in re.split(r"[\r\n]+", output)]


def test_console_lines_can_be_searched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    console = PlainConsole(tmp_path, 235)
    console.write(TRAIN)
    console.write(TEST)
    console.finish(SUMMARY)
    assert capsys.readouterr().out.splitlines() == [
        f"step 10/235 {TRAIN_LINE}",
        f"step 235/235 {TEST_LINE}",
        *concluding(tmp_path),
    ]


def test_one_rank_is_not_many(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    PlainConsole(tmp_path, 235).finish({**SUMMARY, "ranks": 1})
    assert "on 1 rank)" in capsys.readouterr().out


def test_the_command_to_look_with_can_be_pasted_whatever_the_folder_is_called(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    PlainConsole(tmp_path / "my run", 235).finish(SUMMARY)
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("look: "))
    assert shlex.split(line)[1:] == ["tensorboard", "--logdir", str(tmp_path / "my run")]


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.4, "0:00"), (59.6, "1:00"), (92.4, "1:32"), (3599.4, "59:59"), (3727.0, "1:02:07")]
)
def test_durations_are_read_at_a_glance(seconds: float, shown: str) -> None:
    assert clock(seconds) == shown


def test_a_pipe_receives_plain_lines_without_escape_codes(tmp_path: Path) -> None:
    assert piped(tmp_path).splitlines() == [
        f"step 10/235 {TRAIN_LINE}",
        f"step 235/235 {TEST_LINE}",
        *concluding(tmp_path),
    ]


def test_a_pipe_receives_plain_lines_where_colours_are_forced(tmp_path: Path) -> None:
    assert "\x1b" not in piped(tmp_path, FORCE_COLOR="1")


def test_a_terminal_that_can_only_print_receives_plain_lines(tmp_path: Path) -> None:
    output = on_terminal(tmp_path, columns=80, TERM="dumb")
    assert "\x1b" not in output
    assert f"step 10/235 {TRAIN_LINE}" in output.splitlines()


@pytest.mark.parametrize("launcher", ["HOROVOD", "OMPI_COMM_WORLD"])
def test_under_launchers_lines_are_plain_unless_one_has_the_terminal(tmp_path: Path, launcher: str) -> None:
    ranks = {f"{launcher}_RANK": "0", f"{launcher}_SIZE": "2"}
    output = on_terminal(tmp_path, columns=80, **ranks)
    assert f"step 10/235 {TRAIN_LINE}" in output.splitlines() and "\x1b" not in output
    assert "\x1b" in on_terminal(tmp_path, columns=80, **ranks, JOB_TERMINAL="yes")


def test_a_terminal_of_80_columns_shows_progress_in_one_line_and_keeps_what_matters(tmp_path: Path) -> None:
    lines = visible(on_terminal(tmp_path, columns=80))
    (row,) = (line for line in lines if line.startswith("0     235"))
    kept = [TerminalConsole._HEADER.format(" test"), row, *concluding(tmp_path)]
    for line in kept:
        assert line in lines  # whole: a terminal breaks long lines itself, and copies them unbroken
    progress = [line for line in lines if line not in kept]
    assert any(TRAIN_LINE in line for line in progress)
    assert max(map(len, progress)) <= 80
    assert "step 10/235" not in "\n".join(lines)


def shown(*records: dict[str, Any]) -> tuple[list[str], str]:
    """The table of these records on a terminal of 80 columns, as lines, and all that was sent there."""
    stream = io.StringIO()
    screen = Console(file=stream, width=80, force_terminal=True, color_system="standard")
    console = TerminalConsole(Path("run"), 470, screen)
    for record in records:
        console.write(record)
    console.close()
    table = re.compile(r"epoch +step|[ \d]{5} +\d+ ")
    return [line for line in unstyled(stream.getvalue()) if table.match(line)], stream.getvalue()


def test_the_table_of_epochs_fits_80_columns_under_its_header_and_marks_the_best_so_far() -> None:
    accuracies = (0.837, 0.9, 0.89)
    tests = [{**TEST, "step": 235 * (e + 1), "epoch": e, "accuracy": a} for e, a in enumerate(accuracies)]
    (header, *rows), _ = shown(TRAIN, *tests)
    assert [row.split()[:7] for row in rows] == [
        ["0", "235", "0.2500", "0.9000", "0.5000", "0.8370", "21000"],
        ["1", "470", "0.2500", "0.9000", "0.5000", "0.9000", "21000"],
        ["2", "705", "0.2500", "0.9000", "0.5000", "0.8900", "21000"],
    ]
    assert [row.endswith("*") for row in rows] == [True, True, False]
    assert len(rows[0]) <= 80
    ends = [match.end() for match in re.finditer(r"\S+( \S+)*", header)]
    assert [match.end() for match in re.finditer(r"\S+", rows[2])] == ends  # each number below its name


def test_without_colours_the_table_says_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    coloured, sent = shown(TRAIN, TEST)
    assert re.search(r"\x1b\[[0-9;]*3[0-7]m", sent)
    monkeypatch.setenv("NO_COLOR", "1")
    plain, sent = shown(TRAIN, TEST)
    assert not re.search(r"\x1b\[[0-9;]*(3|4|9)[0-7]m", sent)
    assert plain == coloured and len(plain) == 2


def test_a_folder_in_brackets_is_shown_as_it_is_called(tmp_path: Path) -> None:
    folder = tmp_path / "lr[bold]"
    folder.mkdir()
    assert f"{DONE_LINE}{folder}" in visible(on_terminal(folder, columns=80))


def test_validation_and_averaged_weights_are_told_as_such() -> None:
    validated = {**TEST, "split": "validation", "average_loss": 0.25, "average_accuracy": 0.9}
    assert describe(validated) == (
        "epoch 0 validation loss 0.5000 accuracy 0.8370; of averaged weights loss 0.2500 accuracy 0.9000"
        " (train loss 0.2500 accuracy 0.9000)"
    )
    summary = {key: value for key, value in SUMMARY.items() if key != "best_test_accuracy"}
    summary.update(
        best_validation_accuracy=0.85, average_test_accuracy=0.84, average_test_loss=0.25, average_sha256="cd" * 32
    )
    lines = conclude(summary, Path("runs/one"))
    assert lines[0] == "best: validation accuracy 0.8500 after step 100"
    assert lines[-2] == "average of the weights: test accuracy 0.8400, loss 0.2500; weights cdcdcdcdcdcd"
    assert lines[-1].startswith("done: test accuracy 0.8370")


def test_the_table_of_a_terminal_shows_validations_and_the_average() -> None:
    stream = io.StringIO()
    writer = TerminalConsole(Path("runs/one"), 235, Console(file=stream, force_terminal=False, width=120))
    for accuracy, average in ((0.8, 0.7), (0.7, 0.75)):
        writer.write({**TEST, "split": "validation", "accuracy": accuracy, "average_accuracy": average})
    writer.write({**TEST, "average_accuracy": 0.99})
    writer.close()
    rows = [line for line in stream.getvalue().splitlines() if line.strip()]
    assert len(rows) == 3 and rows[0].split()[5:8] == ["valid.", "loss", "accuracy"]
    assert rows[0].endswith("average")
    assert rows[1].rstrip().endswith("0.7000 *") and rows[2].rstrip().endswith("0.7500 *")
