"""What the hosts' answers come to: who differs, who cannot be reached, and by which interface the ranks talk."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from launch.hosts.checks import (
    SHELL,
    Answer,
    Problem,
    Question,
    ask,
    ask_all,
    interfaces,
    judge,
    judge_network,
    place,
    table,
)  # fmt: skip
from launch.hosts.srun import Srun
from launch.hosts.ssh import Reach, Ssh

SSH = Ssh()
ROOT = Path("/opt/job")
QUESTION = Question("/opt/job/.venv/bin/python", ROOT, Path("/"), Path("/runs/one"), ["run.dir=/runs/one"])
FACTS = {
    "hostname": "h",
    "commit": "a" * 40,
    "python": "3.11.7",
    "packages": {"mxnet": "1.9.1", "numpy": "1.23.5"},
    "processor": "Xeon: avx2 avx512f",
    "free_disk_bytes": 61e9,
    "data": True,
    "interfaces": {"lo": ["127.0.0.1"], "eth0": ["10.0.0.1"]},
    "clock_unix_seconds": 0.0,
}


def answer(host: str, address: str = "10.0.0.1", launcher: str = "10.0.0.9", **facts: Any) -> Answer:
    return Answer(host, facts={**FACTS, **facts}, address=address, launcher=launcher)


def told(*answers: Answer) -> list[str]:
    return [str(problem) for problem in judge(answers, ROOT)]


def says(text: str, code: int = 0, errors: str = "") -> list[str]:
    return ["sh", "-c", f"cat <<'END'\n{text}\nEND\necho '{errors}' >&2; exit {code}"]


def asked(text: str, code: int = 0, errors: str = "", timeout: float = 20, reach: Reach = SSH) -> Answer:
    return ask("h", says(text, code, errors), QUESTION, timeout, reach.remedy)


SAID = 'Welcome!\nconnection=10.0.0.9 50000 10.0.0.1 22\ngpus=4\ncheckpoints=2\n{"facts": %s, "checks": []}'


def test_an_answer_is_understood_whatever_a_login_script_writes_first() -> None:
    got = asked(SAID % json.dumps(FACTS))
    assert got.problem is None
    assert (got.address, got.launcher, got.gpus, got.checkpoints) == ("10.0.0.1", "10.0.0.9", 4, 2)
    assert got.facts["packages"] == FACTS["packages"]


@pytest.mark.parametrize(
    ("code", "errors", "field", "remedy"),
    [
        (255, "ssh: connect to host h port 22: No route to host", "reachable", "`ssh h true` must work"),
        (255, "root@h: Permission denied (publickey).", "reachable", "ssh-copy-id h"),
        (255, "Host key verification failed.", "reachable", "compare its key"),
        (255, "REMOTE HOST IDENTIFICATION HAS CHANGED!\nHost key verification failed.", "reachable", "do not trust it"),
        (90, "", "directory", "start from a directory that all hosts have"),
        (127, "sh: 1: exec: python: not found", "environment", "run /opt/job/launch/setup.sh on h"),
        (2, "error: can not open file job/doctor.py", "doctor", "bring /opt/job there to this commit"),
        (0, "", "doctor", "bring /opt/job there"),
    ],
)
def test_each_way_of_failing_has_its_field_and_its_remedy(code: int, errors: str, field: str, remedy: str) -> None:
    problem = asked("" if code in (90, 255) else "connection=", code, errors).problem
    assert problem is not None
    assert (problem.host, problem.field) == ("h", field)
    assert remedy in problem.remedy
    if errors:
        assert errors.splitlines()[-1] in problem.message


NOTICE = "srun: error: h: task 0: Exited with exit code"


@pytest.mark.parametrize(
    ("said", "code", "errors", "told"),
    [
        (
            "",
            1,
            "srun: error: Unable to create step for job 7: Requested nodes are down",
            "h: reachable: srun: error: Unab",
        ),
        (
            "",
            1,
            "srun: cluster lacks cpu binding\nsrun: error: Node failure on h",
            "srun: error: Node failure on h; `sinfo",
        ),
        ("", 90, f"{NOTICE} 90", "h: directory: / is not there"),
        (
            "connection=",
            127,
            f"sh: 1: exec: python: not found\n{NOTICE} 127",
            "h: environment: sh: 1: exec: python: not",
        ),
        ("connection=", 2, f"{NOTICE} 2\nerror: no doctor", "h: doctor: error: no doctor"),
    ],
)
def test_what_srun_adds_does_not_hide_what_went_wrong(said: str, code: int, errors: str, told: str) -> None:
    assert told in str(asked(said, code, errors, reach=Srun("7")).problem)


@pytest.mark.parametrize(
    "said", ["{", "[1]", '{"facts": {}, "checks": []}', '{"facts": {"commit": "a"}, "checks": []}']
)
def test_half_an_answer_is_a_problem_and_no_traceback(said: str) -> None:
    problem = asked(f"gpus=0\n{said}").problem
    assert problem is not None
    assert problem.field == "doctor"


def test_a_host_that_hangs_is_given_up_and_named() -> None:
    problem = ask("h", ["sleep", "1000"], QUESTION, 0.2, SSH.remedy).problem
    assert problem is not None
    assert "no answer within 0.2 s" in str(problem)


def test_hosts_are_asked_at_the_same_time(tmp_path: Path) -> None:
    """Each waits for the others to have been asked: one after the other, they would all be given up."""
    meet = f"touch {tmp_path}/$0; until [ $(ls {tmp_path} | wc -l) = 5 ]; do sleep 0.02; done"
    commands = {f"h{i}": ["sh", "-c", meet, f"h{i}"] for i in range(5)}
    assert [a.problem.field for a in ask_all(commands, QUESTION, 20, SSH.remedy) if a.problem] == ["doctor"] * 5


@pytest.mark.parametrize(("offset", "lowest", "highest"), [(0, 0, 0), (100, 99, 100), (-100, -100, -99)])
def test_a_clock_is_wrong_only_by_what_the_time_of_asking_does_not_explain(
    offset: float, lowest: float, highest: float
) -> None:
    got = asked(SAID % json.dumps({**FACTS, "clock_unix_seconds": time.time() + offset}))
    assert lowest - 1 <= got.clock_ahead_seconds <= highest + 1


def test_the_script_asks_the_doctor_in_the_directory_of_the_ranks(tmp_path: Path) -> None:
    (tmp_path / "a b" / "checkpoints" / "step-00000005").mkdir(parents=True)
    question = Question("/bin/echo", ROOT, tmp_path, tmp_path / "a b", ["run.dir=a b", "x=$HOME;"])
    done = subprocess.run(SHELL, input=question.script(4), capture_output=True, text=True)
    assert done.stdout.splitlines()[-2:] == [
        "checkpoints=1",
        "/opt/job/job/doctor.py --json -np 4 run.dir=a b x=$HOME;",
    ]
    gone = Question("/bin/echo", ROOT, tmp_path / "gone", tmp_path, [])
    assert subprocess.run(SHELL, input=gone.script(None), text=True, capture_output=True).returncode == 90


def test_nothing_that_csh_would_read_otherwise_is_on_the_command_line() -> None:
    assert set("".join(SHELL)) <= set("sh-")
    got = ask("h", ["sh", "-s"], QUESTION._replace(python="/bin/echo", arguments=["it's=a b!"]), 20, SSH.remedy)
    assert got.problem and "it's=a b!" in got.problem.message


@pytest.mark.parametrize("shell", ["csh", "tcsh", "dash", "bash"])
def test_a_host_is_asked_through_each_login_shell(shell: str, tmp_path: Path) -> None:
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not installed")
    python = tmp_path / "it's a !path" / "python"
    python.parent.mkdir()
    python.write_text("#!/bin/sh\nprintf 'asked by %s' \"$*\"\n")
    python.chmod(0o755)
    question = QUESTION._replace(python=str(python), arguments=["run.dir=it's !here", "x=$HOME"])
    checked = ask("h", [shell, "-c", Ssh().command("h", SHELL)[-1]], question, 20, SSH.remedy)
    assert checked.problem and "run.dir=it's !here x=$HOME" in checked.problem.message
    agent = Ssh().command("h", [str(python), "agent.py", "a!b"])[-1]  # as sshd gives it to the login shell
    assert subprocess.run([shell, "-c", agent], capture_output=True, text=True).stdout == "asked by agent.py a!b"


def test_a_variable_that_is_passed_on_to_the_ranks_counts_their_gpus() -> None:
    script = QUESTION._replace(settings={"CUDA_VISIBLE_DEVICES": "0,it's"}).script(None)
    counter = "/opt/job/.venv/bin/python -I /opt/job/job/distributed/gpus.py"
    asked = script.replace(counter, "printenv CUDA_VISIBLE_DEVICES")
    assert "gpus=0,it's\n" in subprocess.run(SHELL, input=asked, capture_output=True, text=True).stdout


def test_a_step_of_slurm_says_by_which_addresses_node_and_launcher_see_each_other() -> None:
    question = QUESTION._replace(python=sys.executable, root=Path(__file__).resolve().parents[3])
    of_the_step = {**os.environ, "SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1"}
    for variables, seen in (
        (of_the_step, "connection=127.0.0.1 0 127.0.0.1 0"),
        ({**of_the_step, "SSH_CONNECTION": "10.0.0.9 1 10.0.0.1 22"}, "connection=10.0.0.9 1 10.0.0.1 22"),
    ):
        script = question.script(None).partition("gpus=")[0].rpartition("\n")[0]
        done = subprocess.run(SHELL, input=script, env=variables, capture_output=True, text=True)
        assert done.stdout.strip() == seen


# --- comparison ---


def test_a_host_whose_own_name_has_no_address_is_refused_for_gloo_would_crash_there() -> None:
    warned = {"name": "hostname", "status": "warn", "message": "h has no address: x", "remedy": "add it to /etc/hosts"}
    told = judge([Answer("a", facts=FACTS, checks=[warned])], ROOT)
    assert [(problem.field, problem.warning) for problem in told] == [("hostname", False)]


def test_equal_hosts_have_no_problem() -> None:
    assert told(answer("a"), answer("b"), answer("c")) == []


def test_one_machine_by_two_names_is_refused() -> None:
    assert told(answer("a", machine="1"), answer("b", machine="2"), answer("c", machine="1"), answer("d")) == [
        "c: host: is the same machine as a; name it once in the hostfile, with slots=N"
    ]


def test_the_host_that_differs_is_named_and_not_the_others() -> None:
    assert told(answer("a", commit="b" * 40), answer("b"), answer("c")) == [
        "a: commit: bbbbbbbbbb, where 2 others have aaaaaaaaaa; bring /opt/job to one commit on all hosts"
    ]


def test_changes_that_are_not_committed_are_another_commit() -> None:
    assert told(answer("a"), answer("b", commit="a" * 40 + "-dirty")) == [
        "b: commit: aaaaaaaaaa-dirty, where a has aaaaaaaaaa; bring /opt/job to one commit on all hosts"
    ]


def test_changes_everywhere_are_a_warning() -> None:
    (problem,) = judge([answer(host, commit="a" * 40 + "-dirty") for host in "ab"], ROOT)
    assert problem.warning


def test_a_host_without_git_among_others_is_refused_and_none_with_it_is_not() -> None:
    assert "b: commit: unknown (no git there), where a has" in told(answer("a"), answer("b", commit=None))[0]
    assert told(answer("a", commit=None), answer("b", commit=None)) == []


def test_other_missing_and_further_packages_are_named() -> None:
    others = {"mxnet": "1.9.0", "extra": "2"}
    assert told(answer("a"), answer("b", packages=others), answer("c")) == [
        "b: packages: extra 2, where the others have none; run /opt/job/launch/setup.sh on b",
        "b: packages: mxnet 1.9.0, where the others have 1.9.1; run /opt/job/launch/setup.sh on b",
        "b: packages: numpy none, where the others have 1.23.5; run /opt/job/launch/setup.sh on b",
    ]


def test_another_python_is_named() -> None:
    assert (
        "b: packages: Python 3.9.1, where the others have 3.11.7" in told(answer("a"), answer("b", python="3.9.1"))[0]
    )


def test_what_a_doctor_finds_wrong_is_told_with_its_remedy() -> None:
    sick = answer("b")
    sick.checks = [
        {"name": "mxnet", "status": "fail", "message": "does not compute", "remedy": "make setup"},
        {"name": "cores", "status": "warn", "message": "few", "remedy": "buy"},
    ]
    assert told(answer("a"), sick) == ["b: mxnet: does not compute; make setup"]


@pytest.mark.parametrize(("sick", "problems"), [("a", 1), ("b", 0)])
def test_only_the_host_of_rank_0_needs_room_for_the_run(sick: str, problems: int) -> None:
    answers = [answer("a"), answer("b")]
    full = {"name": "disk", "status": "fail", "message": "full", "remedy": "make room"}
    answers["ab".index(sick)].checks = [full]
    assert len(judge(answers, ROOT)) == problems


def test_checkpoints_that_rank_0_would_not_see_are_refused() -> None:
    elsewhere = answer("b")
    elsewhere.checkpoints = 3
    (problem,) = told(answer("a"), elsewhere)
    assert problem.startswith("b: run.dir: holds checkpoints which a, where rank 0 runs, does not see")
    seen = answer("a")
    seen.checkpoints = 3
    assert told(seen, elsewhere) == [], "a shared file system"


def test_a_wrong_clock_is_a_warning() -> None:
    late = answer("b")
    late.clock_ahead_seconds = -94.2
    (problem,) = judge([answer("a"), late], ROOT)
    assert problem.warning
    assert "b: clock: 94 s or more behind" in str(problem)


def test_a_host_that_said_nothing_is_compared_with_nobody() -> None:
    gone = Answer("b", Problem("b", "reachable", "gone", "wait"))
    assert told(answer("a"), gone) == ["b: reachable: gone; wait"]
    assert told(gone) == ["b: reachable: gone; wait"]


# --- interfaces ---


def test_the_interface_is_the_one_that_ssh_comes_in_by_whatever_its_name() -> None:
    answers = [
        answer("a"),
        answer("b", "10.0.0.2", interfaces={"ens7": ["192.168.0.2", "10.0.0.2"], "lo": ["127.0.0.1"]}),
    ]
    assert interfaces(answers, []) == {"a": "eth0", "b": "ens7"}


def test_of_the_interfaces_that_are_wanted_each_host_takes_its_first() -> None:
    answers = [answer("a", interfaces={"eth0": ["10.0.0.1"], "ib0": ["10.1.0.1"]}), answer("b")]
    assert interfaces(answers, ["ib0", "eth0"]) == {"a": "ib0", "b": "eth0"}


def test_an_interface_without_an_address_is_none() -> None:
    silent = answer("a", interfaces={"ib0": [], "eth0": ["10.0.0.1"]})
    (problem,) = judge_network([silent], ["ib0"], {"10.0.0.9"}, None)
    assert str(problem).startswith("a: interface: none is named ib0 (there are: ib0, eth0 10.0.0.1)")


def test_an_address_that_no_interface_carries_is_told() -> None:
    (problem,) = judge_network([answer("a", "203.0.113.7")], [], {"10.0.0.9"}, None)
    assert "none carries its address '203.0.113.7'" in problem.message
    assert "--network-interface" in problem.remedy


def test_a_launcher_behind_a_translated_address_has_to_be_named() -> None:
    (problem,) = judge_network([answer("a")], [], {"192.168.0.4"}, None)
    assert "it sees this machine as 10.0.0.9, which is no address of this machine" in problem.message
    assert list(judge_network([answer("a")], [], {"192.168.0.4"}, "10.0.0.9")) == []


def test_a_host_that_needs_no_ssh_is_where_the_others_see_the_launcher() -> None:
    here, there = Answer("a", facts=FACTS), answer("b", launcher="10.0.0.9")
    place([here, there], {"a"})
    assert (here.address, here.launcher) == ("10.0.0.9", "10.0.0.9")
    alone = Answer("a", facts=FACTS)
    place([alone], {"a"})
    assert interfaces([alone], []) == {"a": "lo"}


def test_the_table_has_a_line_a_host_and_tells_good_from_bad() -> None:
    from rich.console import Console

    answers = [
        answer("a"),
        answer("b", commit="b" * 40, data=False),
        Answer("c", Problem("c", "reachable", "gone", "wait")),
    ]
    problems = judge(answers, ROOT)
    console = Console(width=140, record=True, force_terminal=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table(answers, {"a": 1, "b": 2, "c": 1}, interfaces(answers, []), problems))
    lines = {line.split()[1]: line for line in console.export_text(clear=False).splitlines() if line.startswith("│")}
    assert [*lines] == ["a", "b", "c"]
    assert "61 GB" in lines["a"] and "eth0 10.0.0.1" in lines["a"] and "same" in lines["a"]
    assert "to fetch" in lines["b"]
    assert "no" in lines["c"]
    assert "\x1b[31mbbbbbbbbbb" in console.export_text(styles=True)


def test_a_host_with_another_processor_is_named_as_a_warning() -> None:
    problems = judge([answer("a"), answer("b", processor="Opteron: avx2"), answer("c")], ROOT)
    assert [(problem.host, problem.field, problem.warning) for problem in problems] == [("b", "processor", True)]
    assert "Opteron without avx512f, where the others have Xeon" in str(problems[0])
