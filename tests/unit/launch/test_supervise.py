"""How a job on several hosts ends. The agents are real and run here; the ranks are scripts."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.hosts import supervise
from launch.hosts.supervise import Job, Site

AGENT = [sys.executable, str(Path(__file__).resolve().parents[3] / "launch" / "hosts" / "agent.py")]
WAIT = "while :; do sleep 0.05; done"
STUBBORN = f"trap '' TERM; {WAIT}"


@pytest.fixture(autouse=True)
def quick_and_without_a_trace(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(supervise, "_TERM_SECONDS", 0.3)
    monkeypatch.setattr(supervise, "_KILL_SECONDS", 10.0)
    handlers = {number: signal.getsignal(number) for number in supervise._SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def run(*scripts: str, stop_seconds: float = 10.0, agents: list[list[str]] | None = None) -> int:
    sites = [
        Site(
            f"host{rank}",
            agents[rank] if agents else AGENT,
            {
                "directory": "/",
                "command": ["bash", "-c", script],
                "environment": {"LAUNCHER": str(os.getpid())},
                "ranks": [{"HOROVOD_RANK": str(rank)}],
                "silence_seconds": 60,
                "grace_seconds": 0.2,
            },
        )
        for rank, script in enumerate(scripts)
    ]
    return Job(sites, stop_seconds).run()


def test_all_done_is_0_and_every_line_says_who_wrote_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("echo one", "echo two >&2") == 0
    output = capsys.readouterr()
    assert output.out == "[0 host0] one\n"
    assert output.err == "[1 host1] two\n"


@pytest.mark.parametrize("other", [WAIT, STUBBORN])
def test_one_that_fails_ends_all_and_is_named(other: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(other, "exit 3") == 1
    assert capsys.readouterr().err.splitlines()[-1] == "launch/cluster.sh: rank 1 on host1 ended with exit code 3"


def test_a_rank_that_was_killed_is_blamed_though_others_noticed_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(supervise, "_TERM_SECONDS", 10.0)
    when_asked = f"trap 'kill -9 $$' TERM; touch {tmp_path}/ready; {WAIT}"
    assert run(f"until [ -e {tmp_path}/ready ]; do sleep 0.02; done; exit 1", when_asked) == 1
    assert "rank 1 on host1 was ended by signal 9" in capsys.readouterr().err.splitlines()[-1]


def test_a_lost_host_is_blamed_before_its_peers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(supervise, "_TERM_SECONDS", 10.0)
    when_the_others_are_ended = 'until [ "$word" = term ]; do read -r word; done'
    lost = ["bash", "-c", f"{when_the_others_are_ended}; echo the link is cut >&2; exit 255"]
    assert run("exit 1", WAIT, agents=[AGENT, lost]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "launch/cluster.sh: host1 (rank 1) was lost: the link is cut"


@pytest.mark.parametrize(
    ("code", "words"), [(255, "the connection broke"), (137, "its agent ended with exit code 137")]
)
def test_a_host_that_is_lost_without_a_word_is_named_all_the_same(
    code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(WAIT, agents=[["bash", "-c", f"exit {code}"]]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == f"launch/cluster.sh: host0 (rank 0) was lost: {words}"


def test_a_bad_configuration_keeps_its_code() -> None:
    assert run("exit 2", WAIT) == 2


def test_preempted_ranks_make_75_and_the_others_are_given_the_time(tmp_path: Path) -> None:
    slow = f"trap 'sleep 0.6; touch {tmp_path}/saved; exit 75' TERM; touch {tmp_path}/ready; {WAIT}"
    assert run(f"until [ -e {tmp_path}/ready ]; do sleep 0.02; done; exit 75", slow) == 75
    assert (tmp_path / "saved").exists()


def test_a_signal_to_the_launcher_asks_all_to_stop(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    ready = tmp_path / "ready"  # or the signal may find the other rank before it knows what to do with it
    asks = f"until [ -e {ready} ]; do sleep 0.02; done; kill -TERM $LAUNCHER"
    assert run(f"trap 'exit 75' TERM; {asks}; {WAIT}", f"trap 'exit 75' TERM; touch {ready}; {WAIT}") == 75
    assert "preempted, with a checkpoint written" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "code"), [("TERM", 143), ("INT", 130), ("HUP", 143), ("USR1", 143)])
def test_a_signal_that_leaves_no_checkpoint_has_its_own_code(name: str, code: int) -> None:
    assert run(f"kill -{name} $LAUNCHER; {WAIT}") == code


def test_ranks_that_do_not_stop_in_time_are_killed() -> None:
    assert run(f"trap '' TERM; kill -TERM $LAUNCHER; {WAIT}", stop_seconds=0.3) == 143


def test_one_signal_that_is_delivered_twice_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """As timeout(1) does: to the process, and to its group."""
    monkeypatch.setattr(supervise, "_ECHO_SECONDS", 60.0)
    assert run(f"trap 'kill -TERM $LAUNCHER; sleep 0.5; exit 75' TERM; kill -TERM $LAUNCHER; {WAIT}") == 75


def test_a_signal_while_the_others_are_ended_hurries(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(supervise, "_TERM_SECONDS", 100.0)  # longer than the test may take
    asked = f"trap 'kill -TERM $LAUNCHER' TERM; touch {tmp_path}/ready; {WAIT}"
    assert run(f"until [ -e {tmp_path}/ready ]; do sleep 0.02; done; exit 1", asked, stop_seconds=100) == 143
    assert "ending all ranks at once" in capsys.readouterr().err


def test_the_second_signal_ends_all_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(supervise, "_ECHO_SECONDS", 0.0)
    twice = f"trap 'kill -TERM $LAUNCHER' TERM; kill -TERM $LAUNCHER; {WAIT}"
    assert run(twice, stop_seconds=100) == 143
    assert "ending all ranks at once" in capsys.readouterr().err


def test_a_host_that_never_answers_is_given_up(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(supervise, "_KILL_SECONDS", 0.3)
    assert run("exit 1", WAIT, agents=[AGENT, ["sleep", "1000"]]) == 1
    assert "host1 does not answer" in capsys.readouterr().err


def test_a_host_that_says_nothing_more_is_lost(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing ends its connection: it was switched off."""
    plan = {"silence_seconds": 0.3, "ranks": [{"HOROVOD_RANK": "0"}]}
    assert Job([Site("host0", ["bash", "-c", """echo '{"here": true}'; sleep 1000"""], plan)], 10.0).run() == 1
    assert "host0 (rank 0) was lost: it does not answer" in capsys.readouterr().err


def test_a_host_that_takes_long_to_say_its_first_word_is_waited_for() -> None:
    late = ["bash", "-c", 'sleep 0.5; exec "$0" "$@"', *AGENT]
    plan = {
        "directory": "/", "command": ["true"], "environment": {}, "ranks": [{"HOROVOD_RANK": "0"}],
        "silence_seconds": 0.3, "grace_seconds": 0.2,
    }  # fmt: skip
    assert Job([Site("host0", late, plan)], 10.0).run() == 0


def test_what_a_login_script_writes_is_no_message_of_the_agent(capsys: pytest.CaptureFixture[str]) -> None:
    greeting = ["bash", "-c", 'echo welcome; echo {}; echo 5; exec "$0" "$@"', *AGENT]
    assert run("echo one", agents=[greeting]) == 0
    assert "[0 host0] one\n" in capsys.readouterr().out
