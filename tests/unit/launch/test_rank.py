"""``launch/rank.py``: what it reads from Slurm and from an Indexed Job, and who may start when."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from threading import Thread

import pytest
from horovod.runner.common.util.hosts import get_host_assignments, parse_hosts

from job.errors import JobError, UsageError
from launch import rank
from tests.parallel.conftest import free_port

# As a real srun of Slurm 22.05 sets them for the last of three tasks on two nodes.
SLURM = {
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "2",
    "SLURM_NTASKS": "3",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_JOB_NODELIST": "n[0-9]",
    "SLURM_STEP_TASKS_PER_NODE": "2,1",
    "SLURM_TASKS_PER_NODE": "8(x10)",
}
POD = {
    "JOB_COMPLETION_INDEX": "1",
    "JOB_HOSTS": "2",
    "JOB_RANKS_PER_HOST": "4",
    "JOB_COORDINATOR": "train-0.train",
}


def without(variables: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in variables.items() if name not in names}


@pytest.mark.parametrize(
    ("text", "counts"),
    [("1", [1]), ("4(x2)", [4, 4]), ("2(x3),1", [2, 2, 2, 1]), ("1,3(x2),2", [1, 3, 3, 2]), ("16(x1)", [16])],
)
def test_slurms_short_form_of_tasks_per_node_is_spelled_out(text: str, counts: list[int]) -> None:
    assert rank.tasks_per_node(text) == counts


@pytest.mark.parametrize("text", ["", "x", "2(x)", "2(3)", "0", "2,,1", "2(x0)", "-1", "2 (x3)"])
def test_another_form_of_tasks_per_node_is_refused_with_the_variable_named(text: str) -> None:
    with pytest.raises(UsageError, match=r"SLURM_TASKS_PER_NODE=.*N or N\(xNODES\)"):
        rank.tasks_per_node(text)


@pytest.mark.parametrize(
    ("nodelist", "first"),
    [
        ("node7", "node7"),
        ("n[1-2]", "n1"),
        ("n[07-10,12],m3", "n07"),
        ("a,b", "a"),
        ("gpu-[3,5].cluster", "gpu-3.cluster"),
        ("rack[1-2]node[10-19]", "rack1node10"),
    ],
)
def test_the_first_host_of_a_node_list_is_found(nodelist: str, first: str) -> None:
    assert rank.first_host(nodelist) == first


@pytest.mark.parametrize("nodelist", [",a", "[1-2", "n[1-2", "n1]"])
def test_a_node_list_that_cannot_be_read_is_refused(nodelist: str) -> None:
    with pytest.raises(UsageError, match="--coordinator"):
        rank.first_host(nodelist)


def test_a_slurm_task_is_one_rank_at_its_place_in_the_step_not_in_the_allocation() -> None:
    task = rank.read_task(SLURM)
    assert (task.index, task.tasks, task.host, list(task.ranks_on_host)) == (2, 3, 1, [2, 1])
    assert list(task.ranks) == [(2, 0)]
    assert task.coordinator == "n1"


def test_the_batch_script_checks_for_all_tasks_wherever_they_will_be() -> None:
    own = {"SLURM_PROCID": "0", "SLURM_NODEID": "0", "SLURM_TASKS_PER_NODE": "2(x2)"}
    batch = {**without(SLURM, "SLURM_STEP_ID", "SLURM_STEP_NODELIST", "SLURM_STEP_TASKS_PER_NODE"), **own}
    task = rank.read_task(batch)  # as of sbatch --nodes=2 --ntasks-per-node=2 --ntasks=3
    assert (task.index, task.tasks, task.coordinator) == (0, 3, "n0")
    assert rank.read_task(without(batch, "SLURM_NTASKS")).tasks == 4


def test_a_pod_runs_all_ranks_of_its_host() -> None:
    task = rank.read_task(POD)
    assert (task.index, task.tasks, task.host) == (1, 2, 1)
    assert list(task.ranks) == [(4, 0), (5, 1), (6, 2), (7, 3)]
    assert (task.coordinator, task.port) == ("train-0.train", 29400)


def test_the_option_stands_before_the_variable_before_what_slurm_says() -> None:
    assert rank.read_task({**SLURM, "JOB_COORDINATOR": "b"}, "a").coordinator == "a"
    assert rank.read_task({**SLURM, "JOB_COORDINATOR": "b"}).coordinator == "b"


def test_slurm_jobs_and_steps_that_may_share_a_node_meet_on_different_ports() -> None:
    steps = [
        rank.read_task({**SLURM, "SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)})
        for job in range(1, 500)
        for step in range(3)
    ]
    assert len({task.port for task in steps}) == len(steps)
    assert all(1024 < task.port < 32768 for task in steps)
    assert rank.read_task({**SLURM, "JOB_COORDINATOR_PORT": "5"}).port == 5


@pytest.mark.parametrize("name", ["SLURM_NODEID", "SLURM_LOCALID", "SLURM_JOB_ID", "SLURM_STEP_NODELIST"])
def test_a_missing_variable_of_slurm_is_named(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name} is not set"):
        rank.read_task(without(SLURM, name))


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("SLURM_PROCID", "two", "SLURM_PROCID=two is not a number"),
        ("SLURM_PROCID", "3", "contradict.*SLURM_PROCID=3"),
        ("SLURM_NTASKS", "4", "contradict.*SLURM_NTASKS=4.*SLURM_STEP_TASKS_PER_NODE=2,1"),
        ("SLURM_NODEID", "2", "contradict.*SLURM_NODEID=2"),
        ("SLURM_LOCALID", "1", "contradict.*SLURM_LOCALID=1"),
        ("SLURM_STEP_TASKS_PER_NODE", "2;1", "SLURM_STEP_TASKS_PER_NODE=2;1"),
    ],
)
def test_a_wrong_variable_of_slurm_is_named_with_its_value(name: str, value: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        rank.read_task({**SLURM, name: value})


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        (without(POD, "JOB_HOSTS"), "JOB_HOSTS is not set"),
        (without(POD, "JOB_COORDINATOR"), "JOB_COORDINATOR is not set.*DNS name of pod 0"),
        ({**POD, "JOB_COMPLETION_INDEX": "2"}, "JOB_COMPLETION_INDEX=2 does not fit JOB_HOSTS=2"),
        ({**POD, "JOB_RANKS_PER_HOST": "0"}, "JOB_RANKS_PER_HOST=0 is not a number, 1 or more"),
        ({**POD, "JOB_COORDINATOR_PORT": "http"}, "JOB_COORDINATOR_PORT=http"),
        ({}, "neither a Slurm task.*nor a pod.*launch/local.sh"),
    ],
)
def test_a_missing_or_wrong_variable_of_a_pod_is_named(variables: dict[str, str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        rank.read_task(variables)


@pytest.mark.parametrize("counts", [[1], [2, 2], [3, 1, 2]])
def test_every_rank_gets_the_place_that_horovods_own_launcher_gives_it(counts: list[int]) -> None:
    hosts = ",".join(f"host-{host}:{count}" for host, count in enumerate(counts))
    expected = get_host_assignments(parse_hosts(hosts), sum(counts))
    places = [(host, local) for host, count in enumerate(counts) for local in range(count)]
    assert [rank.slot(counts, host, number, local) for number, (host, local) in enumerate(places)] == expected


def test_a_slurm_task_takes_the_cores_that_slurm_gave_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MXNET_CPU_WORKER_NTHREADS", raising=False)
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "6")
    variables = rank.rank_environment(rank.read_task(SLURM), 2, 0)
    assert variables["MXNET_CPU_WORKER_NTHREADS"] == "6"
    assert "OMP_NUM_THREADS" not in variables  # threads of one operator would change its bits
    monkeypatch.setenv("MXNET_CPU_WORKER_NTHREADS", "3")
    assert rank.rank_environment(rank.read_task(SLURM), 2, 0)["MXNET_CPU_WORKER_NTHREADS"] == "3"


def test_the_interface_towards_this_machine_is_the_loopback() -> None:
    variables = rank.meeting_environment("127.0.0.1", 29400)
    assert variables["HOROVOD_GLOO_RENDEZVOUS_ADDR"] == "127.0.0.1"
    assert variables["HOROVOD_GLOO_RENDEZVOUS_PORT"] == "29400"
    assert variables["HOROVOD_CONTROLLER"] == variables["HOROVOD_CPU_OPERATIONS"] == "gloo"
    interfaces = {name for _, name in socket.if_nameindex()}
    assert variables["HOROVOD_GLOO_IFACE"] in interfaces and variables["HOROVOD_GLOO_IFACE"].startswith("lo")


def test_the_users_choice_of_interfaces_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOROVOD_GLOO_IFACE", "ib0")
    assert rank.meeting_environment("192.0.2.7", 1)["HOROVOD_GLOO_IFACE"] == "ib0"
    assert rank.meeting_environment("192.0.2.7", 1)["NCCL_SOCKET_IFNAME"] == "ib0"
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib1")
    assert rank.meeting_environment("192.0.2.7", 1)["NCCL_SOCKET_IFNAME"] == "ib1"


# --- the meeting -----------------------------------------------------------------------------------------------------


@pytest.fixture
def first() -> rank.Task:
    """Pod 0 of two, on a port that is free."""
    variables = {**POD, "JOB_COMPLETION_INDEX": "0", "JOB_COORDINATOR": "127.0.0.1"}
    return rank.read_task({**variables, "JOB_COORDINATOR_PORT": str(free_port())})


@pytest.fixture
def meeting(first: rank.Task) -> Iterator[rank.Meeting]:
    with rank.Meeting(first) as meeting:
        Thread(target=meeting.serve_forever, args=(0.05,), daemon=True).start()
        yield meeting
        meeting.shutdown()


def second_of(first: rank.Task) -> rank.Task:
    return replace(first, index=1, host=1)


def test_nobody_starts_before_all_are_there(first: rank.Task, meeting: rank.Meeting) -> None:
    assert meeting.report(first.job, 0, 0, "a", "127.0.0.1") == (202, "it waits for task 1")
    assert meeting.report(first.job, 0, 0, "a", "127.0.0.1")[0] == 202, "a repeated report is not a second task"
    assert meeting.report(first.job, 1, 1, "b", "192.0.2.7") == (200, "192.0.2.7")
    assert meeting.report(first.job, 0, 0, "a", "127.0.0.1") == (200, "192.0.2.7"), "the address that all can reach"


def test_a_task_that_died_waiting_is_replaced(first: rank.Task, meeting: rank.Meeting) -> None:
    assert meeting.report(first.job, 1, 1, "dead", "192.0.2.7")[0] == 202
    assert meeting.report(first.job, 1, 1, "again", "192.0.2.7")[0] == 202
    assert meeting.report(first.job, 0, 0, "a", "127.0.0.1") == (200, "192.0.2.7"), "the address that all can reach"
    assert meeting.report(first.job, 1, 1, "again", "192.0.2.7")[0] == 200
    assert meeting.report(first.job, 1, 1, "dead", "192.0.2.7")[0] == 409


def test_a_restarted_task_never_joins_the_attempt_that_it_has_left_but_the_next(
    first: rank.Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    with rank.Meeting(first) as earlier:
        Thread(target=earlier.serve_forever, args=(0.05,), daemon=True).start()
        earlier.report(first.job, 0, 0, "a", "127.0.0.1")
        earlier.report(first.job, 1, 1, "b", "127.0.0.1")
        with pytest.raises(JobError, match=rf"waited 1 s.*127\.0\.0\.1:{first.port}: .*earlier attempt"):
            rank.meet(second_of(first), 1)
        earlier.shutdown()
    with rank.Meeting(first) as later:  # the same port at once
        Thread(target=later.serve_forever, args=(0.05,), daemon=True).start()
        assert later.report(first.job, 0, 0, "c", "127.0.0.1")[0] == 202
        assert rank.meet(second_of(first), 10) == "127.0.0.1"
        later.shutdown()


def test_a_coordinator_that_never_comes_is_given_up_with_its_name(first: rank.Task) -> None:
    with pytest.raises(JobError, match=rf"task 1 of 2 has waited 0\.5 s.*127\.0\.0\.1:{first.port}: .*refused"):
        rank.meet(second_of(first), 0.5)
    with pytest.raises(JobError, match=r"no-such-pod\.invalid:\d+: .*(not known|resol)"):
        rank.meet(replace(second_of(first), coordinator="no-such-pod.invalid"), 0.5)


def test_the_coordinator_says_which_tasks_never_came(first: rank.Task, meeting: rank.Meeting) -> None:
    with pytest.raises(JobError, match=r"task 0 of 2 has waited .*: it waits for task 1"):
        rank.meet(first, 0.5)


def test_a_task_of_another_job_is_refused_at_once(first: rank.Task, meeting: rank.Meeting) -> None:
    other = replace(second_of(first), job="an Indexed Job of 3 hosts with 4 ranks each")
    with pytest.raises(UsageError, match=r"belongs to .* 3 hosts .*serves .* 2 hosts"):
        rank.meet(other, 60)


@pytest.mark.parametrize("body", ["", "[]", "{}", '{"job": 1}', "\x00"])
def test_whatever_else_is_sent_to_the_port_changes_nothing(first: rank.Task, meeting: rank.Meeting, body: str) -> None:
    connection = rank.http.client.HTTPConnection("127.0.0.1", first.port, timeout=5)
    connection.request("POST", "/task", body)
    assert connection.getresponse().status == 400
    assert meeting.report(first.job, 1, 1, "b", "127.0.0.1") == (202, "it waits for task 0")


def test_a_port_in_use_is_told(first: rank.Task, meeting: rank.Meeting) -> None:
    with pytest.raises(JobError, match=rf"port {first.port} .*in use.*JOB_COORDINATOR_PORT"):
        rank.Meeting(first)


# --- the ranks of a task ---------------------------------------------------------------------------------------------


@pytest.fixture
def ranks() -> Iterator[rank.Ranks]:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    yield rank.Ranks()
    for number, handler in handlers.items():
        signal.signal(number, handler)


def start(ranks: rank.Ranks, *programs: str) -> None:
    for number, program in enumerate(programs):
        ranks.start(number, [sys.executable, "-c", f"import os, signal, sys, time\n{program}"], {})


def wait_for(file: Path) -> None:
    while not file.exists():  # within the bound of every test
        time.sleep(0.02)


STAYS = "time.sleep(60)"


@pytest.mark.parametrize(
    ("programs", "code"),
    [
        (["sys.exit(0)", "sys.exit(0)"], 0),
        (["sys.exit(75)", "sys.exit(75)"], 75),
        (["sys.exit(0)", "sys.exit(75)"], 75),
        (["sys.exit(75)", "sys.exit(1)"], 1),
        (["sys.exit(2)", STAYS], 2),
        ([STAYS, "sys.exit(1)"], 1),
        ([STAYS, "os.kill(os.getpid(), signal.SIGKILL)"], 1),
    ],
    ids=["done", "preempted", "one preempted", "preempted and failed", "bad configuration", "failed", "killed"],
)
def test_the_first_failure_ends_the_others_and_gives_its_code(
    ranks: rank.Ranks, programs: list[str], code: int
) -> None:
    start(ranks, *programs)
    assert ranks.wait() == code


def test_a_rank_that_ignores_sigterm_is_killed(
    ranks: rank.Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rank, "END_SECONDS", 0.5)
    heard = f"signal.signal(signal.SIGTERM, lambda *_: open({str(tmp_path / 'heard')!r}, 'w'))"
    start(ranks, f"{heard}; open({str(tmp_path / '0')!r}, 'w'); {STAYS}")
    wait_for(tmp_path / "0")
    ranks.start(1, ["sh", "-c", "exit 1"], {})
    assert ranks.wait() == 1
    assert (tmp_path / "heard").exists()
    assert "rank 0: does not end by itself and is killed" in capfd.readouterr().err


def test_the_rank_that_was_killed_is_named_and_not_the_one_that_lost_it(
    ranks: rank.Ranks, capfd: pytest.CaptureFixture[str]
) -> None:
    start(ranks, "sys.exit(1)", "os.kill(os.getpid(), signal.SIGKILL)")
    for process in ranks._processes.values():
        process.wait()
    assert ranks.wait() == 1
    assert "rank 1: ended by SIGKILL" in capfd.readouterr().err


def test_a_signal_is_passed_on_to_every_rank_and_their_code_comes_back(ranks: rank.Ranks, tmp_path: Path) -> None:
    hears = "signal.signal(signal.SIGUSR1, lambda *_: os._exit(75)); open({!r}, 'w'); time.sleep(60)"
    files = [tmp_path / "0", tmp_path / "1"]
    start(ranks, *(hears.format(str(file)) for file in files))
    for file in files:
        wait_for(file)
    signal.raise_signal(signal.SIGUSR1)
    assert ranks.wait() == 75


def test_a_rank_that_a_signal_ended_before_there_was_anything_to_save_is_128_and_the_signal(ranks: rank.Ranks) -> None:
    start(ranks, STAYS)
    signal.raise_signal(signal.SIGTERM)
    assert ranks.wait() == 128 + signal.SIGTERM


# --- the command -----------------------------------------------------------------------------------------------------


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    script = Path(rank.__file__)
    return subprocess.run(
        [sys.executable, str(script), *arguments],
        env={"PATH": "", **variables},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_help_teaches_and_bad_usage_is_one_line_with_code_2() -> None:
    told = run("--help")
    assert told.returncode == 0
    assert all(name in told.stdout for name in ("SLURM_PROCID", "JOB_COMPLETION_INDEX", "JOB_COORDINATOR_PORT", "75"))
    refused = run("train.epochs=1")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith("error: this is neither") and refused.stderr.count("\n") == 1


def test_a_dry_run_prints_the_environment_and_command_of_each_rank() -> None:
    printed = run("--dry-run", "--config", "a.yaml", "run.dir=x", **POD).stdout.splitlines()
    ranks = [line for line in printed if not line.startswith("#")]
    assert [f"HOROVOD_RANK={number} HOROVOD_SIZE=8" in line for number, line in zip(range(4, 8), ranks)] == [True] * 4
    assert all(line.endswith("job/train.py --config a.yaml run.dir=x run.resume=auto") for line in ranks)
    assert "run.resume=auto" not in run("--dry-run", "run.overwrite=true", **POD).stdout


def test_a_rank_that_does_not_end_after_a_second_signal_is_killed(
    ranks: rank.Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rank, "ECHO_SECONDS", -1.0)
    monkeypatch.setattr(rank, "END_SECONDS", 0.1)
    deaf = f"signal.signal(signal.SIGTERM, signal.SIG_IGN); open({str(tmp_path / 'deaf')!r}, 'w'); {STAYS}"
    start(ranks, deaf)
    wait_for(tmp_path / "deaf")
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)
    assert ranks.wait() == 1
