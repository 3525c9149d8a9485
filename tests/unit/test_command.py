"""How a command ends, seen from outside: its exit code, its message, and that it does end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PREAMBLE = """
import threading, time
from job import command
from job.errors import DataError, JobError, PeerLostError, UsageError
command._HOLD_SECONDS = 0.3
"""


def environment(rank: int = 0, size: int = 1) -> dict[str, str]:
    place = {"HOROVOD_RANK": str(rank), "HOROVOD_SIZE": str(size), "HOROVOD_GLOO_RENDEZVOUS_ADDR": "n"}
    launched = place if size > 1 else {}
    own = {name: value for name, value in os.environ.items() if not name.startswith(("HOROVOD_", "OMPI_"))}
    return {**own, **launched, "PYTHONPATH": str(ROOT)}


def run(body: str, rank: int = 0, size: int = 1) -> subprocess.CompletedProcess[str]:
    """Run ``body`` as the main function of a command, in a process that must end within 20 s."""
    indented = "\n".join(f"    {line}" for line in body.splitlines())
    script = f"{PREAMBLE}\ndef main():\n{indented}\ncommand.run(main)\n"
    return subprocess.run(
        [sys.executable, "-c", script], env=environment(rank, size), capture_output=True, text=True, timeout=20
    )


def test_a_command_that_returns_ends_with_0_and_its_output() -> None:
    ended = run("print('worked')")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "worked\n", "")


@pytest.mark.parametrize("error", ["JobError", "DataError"])
def test_a_foreseen_failure_ends_with_1_and_its_message_alone(error: str) -> None:
    ended = run(f"print('so far'); raise {error}('disk full: free some space')")
    assert (ended.returncode, ended.stdout) == (1, "so far\n")
    assert ended.stderr == "error: disk full: free some space\n"


def test_a_usage_error_ends_with_2_and_its_message_alone() -> None:
    ended = run("raise UsageError('train.epochs: not a number')")
    assert (ended.returncode, ended.stderr) == (2, "error: train.epochs: not a number\n")


def test_a_bug_ends_with_1_and_its_traceback() -> None:
    ended = run("1 / 0")
    assert ended.returncode == 1
    assert "Traceback (most recent call last)" in ended.stderr
    assert "ZeroDivisionError: division by zero" in ended.stderr


def test_an_interrupt_ends_with_130_and_no_traceback() -> None:
    ended = run("raise KeyboardInterrupt")
    assert (ended.returncode, ended.stderr) == (130, "error: interrupted\n")


def test_ctrl_c_ends_with_130() -> None:
    script = f"{PREAMBLE}\ndef main():\n    print('ready', flush=True)\n    time.sleep(60)\ncommand.run(main)\n"
    process = subprocess.Popen(
        [sys.executable, "-c", script], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (130, "error: interrupted\n")


@pytest.mark.parametrize("error", ["JobError('lost')", "UsageError('lost')", "PeerLostError('lost')"])
def test_one_of_many_ranks_says_which_it_is(error: str) -> None:
    assert "error: rank 3: lost\n" in run(f"raise {error}", rank=3, size=4).stderr


def test_a_bug_on_one_of_many_ranks_says_which_it_is() -> None:
    assert run("1 / 0", rank=1, size=2).stderr.startswith("error: rank 1: Traceback")


WAITS_ARE_TOLD = "command.time.sleep = lambda seconds: print('held for', seconds)\n"


@pytest.mark.parametrize("error", ["UsageError", "PeerLostError"])
def test_other_ranks_let_rank_0_speak_first(error: str) -> None:
    assert run(f"{WAITS_ARE_TOLD}raise {error}('x')", rank=0, size=2).stdout == ""
    assert run(f"{WAITS_ARE_TOLD}raise {error}('x')", rank=1, size=2).stdout == "held for 0.3\n"


@pytest.mark.parametrize("error", ["JobError", "ValueError", "KeyboardInterrupt"])
def test_a_rank_with_a_failure_of_its_own_speaks_at_once(error: str) -> None:
    assert run(f"{WAITS_ARE_TOLD}raise {error}('x')", rank=1, size=2).stdout == ""


@pytest.mark.parametrize(
    ("error", "code"),
    [("JobError('lost')", 1), ("UsageError('wrong')", 2), ("ValueError('bug')", 1), ("KeyboardInterrupt", 130)],
)
def test_a_failure_ends_the_process_while_another_thread_still_waits(error: str, code: int) -> None:
    ended = run(f"threading.Thread(target=time.sleep, args=(600,)).start()\nraise {error}")
    assert ended.returncode == code


def test_a_failure_skips_exit_hooks_that_may_never_return() -> None:
    ended = run("import atexit\natexit.register(time.sleep, 600)\nraise JobError('lost')")
    assert ended.returncode == 1


def test_help_still_ends_with_0() -> None:
    assert run("raise SystemExit(0)").returncode == 0


def test_a_failure_ends_the_process_though_nobody_reads_its_output() -> None:
    body = "import atexit\natexit.register(time.sleep, 600)\nprint('unread')\nraise JobError('lost')"
    indented = "\n".join(f"    {line}" for line in body.splitlines())
    reader, writer = os.pipe()
    os.close(reader)
    buffered = {name: value for name, value in environment().items() if name != "PYTHONUNBUFFERED"}
    process = subprocess.Popen(
        [sys.executable, "-c", f"{PREAMBLE}\ndef main():\n{indented}\ncommand.run(main)\n"],
        env=buffered,
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writer)
    try:
        _, errors = process.communicate(timeout=5)
    finally:
        process.kill()
    assert (process.returncode, errors) == (1, "error: lost\n")


@pytest.mark.parametrize("closed", ["2>&-", ">&-", ">&- 2>&-"])
@pytest.mark.parametrize(("body", "code"), [("print('worked')", 0), ("raise JobError('lost')", 1)])
def test_closed_output_changes_nothing_of_how_a_command_ends(closed: str, body: str, code: int) -> None:
    script = f"{PREAMBLE}\nimport sys\ndef main():\n    print('note', file=sys.stderr)\n    {body}\ncommand.run(main)\n"
    command = ["sh", "-c", f'"$0" -c "$1" {closed}', sys.executable, script]
    ended = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=20)
    assert ended.returncode == code
    assert "AttributeError" not in ended.stdout + ended.stderr
    assert "note" not in ended.stdout


def test_output_on_a_full_disk_is_told_in_one_message() -> None:
    script = f"{PREAMBLE}\ncommand.run(lambda: print('much', flush=True))\n"
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-c", script]
        ended = subprocess.run(command, env=environment(), stdout=full, stderr=subprocess.PIPE, text=True, timeout=20)
    assert ended.returncode == 1
    assert ended.stderr == (
        "error: standard output cannot be written: No space left on device; free some space, or send it elsewhere\n"
    )


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_a_folder_of_any_bytes_can_be_named_in_any_encoding(encoding: str) -> None:
    script = f"{PREAMBLE}\ncommand.run(lambda: print('in', b'm\\xc3\\xbcll\\xff'.decode('utf-8', 'surrogateescape')))\n"
    ended = subprocess.run(
        [sys.executable, "-c", script],
        env={**environment(), "PYTHONIOENCODING": encoding},
        capture_output=True,
        timeout=20,
    )
    assert (ended.returncode, ended.stderr) == (0, b"")
    assert ended.stdout.startswith(b"in m") and b"\\udcff" in ended.stdout


def test_no_columns_are_not_taken_for_a_width() -> None:
    script = f"{PREAMBLE}\nfrom rich.console import Console\ncommand.run(lambda: Console().print('worked'))\n"
    ended = subprocess.run(
        [sys.executable, "-c", script],
        env={**environment(), "COLUMNS": "0"},
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert (ended.returncode, ended.stdout) == (0, "worked\n")


def test_what_the_watchdog_has_said_is_how_the_process_ends() -> None:
    """Its error is being printed while the run comes to its end."""
    ended = run(
        "from job.distributed import watchdog\n"
        "saying = threading.Event()\n"
        "tell = watchdog.tell\n"
        "def slow(message):\n"
        "    saying.set()\n"
        "    tell(message, stacks=False)\n"
        "    time.sleep(0.5)\n"
        "watchdog.tell = slow\n"
        "threading.Thread(target=watchdog.end_process, args=('step 1: no answer',)).start()\n"
        "saying.wait()"
    )
    assert (ended.returncode, ended.stderr) == (1, "error: step 1: no answer\n")
