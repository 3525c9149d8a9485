"""The agent of a host, as the launcher talks to it: a plan and words in, lines and exit codes out."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from job.checkpoints.store import Store
from launch.hosts import agent as agent_module

AGENT = Path(__file__).resolve().parents[3] / "launch" / "hosts" / "agent.py"
STUBBORN = "trap '' TERM; echo ready; while :; do sleep 0.05; done"  # goes on when asked to stop
WILLING = "trap 'echo stopped; exit 75' TERM; echo ready; while :; do sleep 0.05; done"


class Agent:
    def __init__(self, script: str, ranks: int = 1, **plan: Any) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(AGENT)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        self.send(
            json.dumps(
                {
                    "directory": "/",
                    "command": ["bash", "-c", script],
                    "environment": {},
                    "ranks": [{"HOROVOD_RANK": str(rank)} for rank in range(ranks)],
                    "silence_seconds": 60,
                    "grace_seconds": 0.2,
                    **plan,
                }
            )
        )

    def send(self, word: str) -> None:
        assert self.process.stdin
        self.process.stdin.write(word + "\n")

    def say(self) -> dict[str, Any]:
        assert self.process.stdout
        return dict(json.loads(self.process.stdout.readline()))

    def rest(self) -> list[dict[str, Any]]:
        assert self.process.stdout
        return [json.loads(line) for line in self.process.stdout]  # its input stays open all the while


@pytest.fixture
def start() -> Iterator[Any]:
    agents: list[Agent] = []

    def start(*arguments: Any, **plan: Any) -> Agent:
        agents.append(Agent(*arguments, **plan))
        return agents[-1]

    yield start
    for agent in agents:
        for process in [*children_of(agent), agent.process]:
            process.kill()
        agent.process.wait()
        agent.process.stdin.close()
        agent.process.stdout.close()


def children_of(agent: Agent) -> list[psutil.Process]:
    return psutil.Process(agent.process.pid).children(recursive=True) if agent.process.poll() is None else []


def test_output_and_exit_codes_of_all_ranks_come_back(start: Any) -> None:
    said = start("echo out $HOROVOD_RANK; echo err >&2; exit $((HOROVOD_RANK + 5))", ranks=2).rest()
    for rank in range(2):
        assert {"rank": rank, "stream": "stdout", "text": f"out {rank}"} in said
        assert {"rank": rank, "stream": "stderr", "text": "err"} in said
        assert {"rank": rank, "code": 5 + rank} in said


def test_the_environment_reaches_the_ranks_and_no_command_line(start: Any) -> None:
    agent = start("echo $TOKEN; read -r < /dev/zero", environment={"TOKEN": "token-0815"})
    assert agent.say()["text"] == "token-0815"
    everything = [psutil.Process(agent.process.pid), *children_of(agent)]
    assert len(everything) == 2
    assert not any("token-0815" in " ".join(process.cmdline()) for process in everything)


def test_ranks_run_in_the_directory_of_the_plan(start: Any, tmp_path: Path) -> None:
    assert start("pwd", directory=str(tmp_path)).say()["text"] == str(tmp_path)


def test_term_reaches_every_rank(start: Any) -> None:
    agent = start(WILLING, ranks=2)
    assert [agent.say()["text"] for _ in range(2)] == ["ready", "ready"]
    agent.send("term")
    assert [said["code"] for said in agent.rest() if "code" in said] == [75, 75]


def test_kill_ends_a_rank_that_term_does_not(start: Any) -> None:
    agent = start(STUBBORN)
    agent.say()
    agent.send("term")
    agent.send("here")
    agent.send("kill")
    assert agent.rest()[-1] == {"rank": 0, "code": -9}


@pytest.mark.parametrize(("script", "code"), [(WILLING, 75), (STUBBORN, -9)])
def test_without_a_launcher_the_ranks_are_asked_to_stop_and_then_killed(start: Any, script: str, code: int) -> None:
    agent = start(script)
    agent.say()
    agent.process.stdin.close()
    assert agent.rest()[-1] == {"rank": 0, "code": code}


def test_a_silent_launcher_is_taken_for_dead(start: Any) -> None:
    agent = start(WILLING, silence_seconds=0.3)
    agent.say()
    assert agent.rest()[-1] == {"rank": 0, "code": 75}


@pytest.mark.parametrize("silent", [True, False])
def test_an_agent_whose_launcher_fell_silent_does_what_the_plan_says_then(
    start: Any, tmp_path: Path, silent: bool
) -> None:
    plan = {"stay": True, "run_dir": "run", "directory": str(tmp_path), "orphaned": ["touch", str(tmp_path / "done")]}
    agent = start("", ranks=0, silence_seconds=0.5 if silent else 60, **plan)
    if not silent:
        agent.process.stdin.close()
    agent.rest()
    assert (tmp_path / "done").exists() == silent


def test_an_agent_gives_signs_of_life(start: Any) -> None:
    agent = start(WILLING, silence_seconds=6)
    assert {"here": True} in [agent.say(), agent.say()]  # beside what its rank says


def test_an_agent_that_was_itself_paused_still_hears_a_launcher_that_was_paused_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After a pause the first wait is over, by the clock, whatever its length; the launcher's next word comes then."""
    answers = iter([False, False, True])
    monkeypatch.setattr(agent_module.select, "select", lambda read, *_: (read if next(answers) else [], [], []))
    words = io.BytesIO(b'{"silence_seconds": 60}\n')
    assert agent_module.Agent(words)._hears()


def test_an_agent_that_stays_starts_ranks_again_and_tells_what_it_has(start: Any, tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints" / "step-00000003").mkdir(parents=True)
    agent = start("", ranks=0, stay=True, run_dir="run", directory=str(tmp_path))
    agent.send("look")
    assert agent.say() == {"commit": -1, "checkpoint": 3}
    commit = "mkdir $JOB_COMMITS/step-00000007; echo 5 7 > $JOB_COMMITS/progress; echo $JOB_COMMITS"
    for script in (f"{commit}; {WILLING}", "exit 3"):
        agent.send(json.dumps({"command": ["bash", "-c", script], "ranks": [{"HOROVOD_RANK": "1"}]}))
        said = []
        while {"ended": True} not in said:
            said.append(agent.say())
            if said[-1].get("text") == "ready":
                agent.send("look")
            if "commit" in said[-1]:
                assert said[-1] == {"commit": 7, "checkpoint": 3}
                agent.process.terminate()  # as the machine does when it goes down
            if "leaving" in said[-1]:
                agent.send("term")
        assert {"rank": 1, "code": 3 if script == "exit 3" else 75} in said
        if script != "exit 3":
            assert {"progress": [5, 7]} in said and {"leaving": True} in said
            memory = Path(next(word["text"] for word in said if "text" in word))
    assert memory.exists()
    agent.process.stdin.close()
    assert agent.rest() == []
    assert not memory.exists()


def test_an_agent_saves_the_last_commit_when_it_is_asked_to(start: Any, tmp_path: Path) -> None:
    checkpoints, commit = Store(tmp_path / "run" / "checkpoints", 1), Store(tmp_path / "memory", 1)
    checkpoints.write(3, {}, {})
    commit.write(7, {}, {})
    agent = start("", ranks=0, stay=True, run_dir="run", directory=str(tmp_path))
    put = f"cp -r {tmp_path}/memory/* $JOB_COMMITS"
    agent.send(json.dumps({"command": ["bash", "-c", put], "ranks": [{"HOROVOD_RANK": "1"}]}))
    assert [agent.say(), agent.say()] == [{"rank": 1, "code": 0}, {"ended": True}]
    agent.send("save")
    assert agent.say() == {"saved": ""}
    assert checkpoints.paths()[0].name == "step-00000007"


@pytest.mark.parametrize(("on_disk", "saved"), [(3, True), (9, False)])
def test_an_agent_whose_launcher_is_gone_saves_the_last_commit(
    start: Any, tmp_path: Path, on_disk: int, saved: bool
) -> None:
    checkpoints, commit = Store(tmp_path / "run" / "checkpoints", 1), Store(tmp_path / "memory", 1)
    checkpoints.write(on_disk, {}, {})
    commit.write(7, {}, {})
    (tmp_path / "run" / "lock").touch()
    agent = start("", ranks=0, stay=True, run_dir="run", directory=str(tmp_path))
    put = f"cp -r {tmp_path}/memory/* $JOB_COMMITS; {STUBBORN}"  # a rank that misses the others, and must be killed
    agent.send(json.dumps({"command": ["bash", "-c", put], "ranks": [{"HOROVOD_RANK": "1"}]}))
    assert agent.say()["text"] == "ready"
    agent.process.stdin.close()
    assert agent.rest() == [{"rank": 1, "code": -9}, {"ended": True}]
    newest = checkpoints.paths()[0].name
    assert newest == ("step-00000007" if saved else f"step-{on_disk:08d}")


def test_what_a_rank_leaves_behind_is_ended_with_it(start: Any) -> None:
    agent = start("sleep 1000 & echo $!")
    left = psutil.Process(int(agent.say()["text"]))
    assert agent.rest()[-1] == {"rank": 0, "code": 0}
    psutil.wait_procs([left], timeout=10)
    assert not left.is_running() or left.status() == psutil.STATUS_ZOMBIE


def test_a_command_that_cannot_be_started_is_told(start: Any) -> None:
    (said,) = start("", command=["/nowhere/python"]).rest()
    assert "cannot start a rank" in said["error"]
    assert "/nowhere/python" in said["error"]
