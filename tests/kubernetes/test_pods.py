"""What runs in the pods, run for real: as uid 1000, without a capability, on a read-only root file system."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.kubernetes.pod import KUBERNETES, PATIENCE, Pod, make_keys, manifest, unavailable

pytestmark = pytest.mark.skipif(bool(unavailable()), reason=unavailable())

MPIJOB = manifest("mpijob/mpijob.yaml", "MPIJob")["spec"]["mpiReplicaSpecs"]
WORKER = MPIJOB["Worker"]["template"]["spec"]["containers"][0]
LAUNCHER = "/tmp/job/launch/kubernetes/launcher.sh"

# In place of launch/cluster.sh: each call takes the next line of /tmp/outcomes, and runs it.
CLUSTER = """#!/usr/bin/env bash
echo "$@" >>/tmp/calls
outcome=$(head -1 /tmp/outcomes) && sed -i 1d /tmp/outcomes
eval "$outcome"
"""


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_keys(tmp_path_factory.mktemp("secret") / "ssh")


@pytest.fixture(scope="module")
def a_worker(tmp_path_factory: pytest.TempPathFactory, keys: Path) -> Iterator[Pod]:
    with Pod(tmp_path_factory.mktemp("worker"), keys, WORKER["command"]) as pod:
        pod.until("ssh", "worker-0", "true")
        yield pod


@pytest.fixture(scope="module")
def not_ours(a_worker: Pod) -> set[Path]:
    """What pod.sh had to mount into its /tmp: this repository's environment, if it lies below there."""
    return set(a_worker.tmp.iterdir())


@pytest.fixture
def worker(a_worker: Pod, not_ours: set[Path]) -> Iterator[Pod]:
    """One that has just been made: nothing lies in its /tmp but a copy of launcher.sh beside a false cluster.sh."""
    for entry in set(a_worker.tmp.iterdir()) - not_ours:
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    kubernetes = a_worker.tmp / "job" / "launch" / "kubernetes"
    kubernetes.mkdir(parents=True)
    shutil.copy(KUBERNETES / "launcher.sh", kubernetes)
    (a_worker.tmp / "hostfile").write_text("worker-0 slots=1\n")
    cluster = kubernetes.parent / "cluster.sh"
    cluster.write_text(CLUSTER)
    cluster.chmod(0o755)
    yield a_worker
    a_worker.end_commands()


def outcomes(worker: Pod, *lines: str) -> None:
    (worker.tmp / "outcomes").write_text("".join(f"{line}\n" for line in lines))
    for file in ("outcomes", "."):
        (worker.tmp / file).chmod(0o777)


def calls(worker: Pod) -> list[str]:
    file = worker.tmp / "calls"
    return file.read_text().splitlines() if file.exists() else []


def sessions(worker: Pod) -> int:
    return worker.text().count("Accepted publickey")


def until(condition: Callable[[], bool], otherwise: str) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, otherwise
        time.sleep(0.02)


# --- sshd and ssh ----------------------------------------------------------------------------------------------------


def test_the_jobs_key_opens_a_session_that_has_the_jobs_python(worker: Pod) -> None:
    code, output = worker.run("ssh", "worker-0", "id -u && command -v python && grep CapBnd /proc/self/status")
    assert (code, output.split()) == (0, ["1000", "/opt/job/.venv/bin/python", "CapBnd:", "0" * 16])


def test_the_root_file_system_of_the_pod_is_read_only(worker: Pod) -> None:
    for place in ("/", "/home/mpiuser", "/home/mpiuser/.ssh", "/usr", "/etc"):
        code, output = worker.run("touch", f"{place}/x")
        assert code == 1 and ("Read-only" in output or "Permission denied" in output), output


def test_a_stranger_with_another_key_is_not_let_in(worker: Pod, tmp_path: Path) -> None:
    shutil.copy(make_keys(tmp_path / "other") / "id_rsa", worker.tmp / "key")
    shutil.chown(worker.tmp / "key", 1000, 1000)
    code, output = worker.run("ssh", "-i", "/tmp/key", "-o", "IdentitiesOnly=yes", "worker-0", "true")
    assert code == 255 and "Permission denied (publickey)" in output


def test_root_is_not_let_in(worker: Pod) -> None:
    code, output = worker.run("ssh", "root@worker-0", "true")
    assert code == 255 and "Permission denied (publickey)" in output


def test_a_host_that_does_not_hold_the_jobs_key_is_not_talked_to(worker: Pod, tmp_path: Path) -> None:
    shutil.copy(make_keys(tmp_path / "other") / "id_rsa", worker.tmp / "host_key")
    shutil.chown(worker.tmp / "host_key", 1000, 1000)
    command = [*WORKER["command"], "-o", "Port=2223", "-o", "HostKey=/tmp/host_key"]
    impostor = worker.popen(*command)
    worker.until("bash", "-c", "</dev/tcp/127.0.0.1/2223")
    code, output = worker.run("ssh", "-p", "2223", "worker-0", "true")
    impostor.terminate()
    assert code == 255 and "Host key verification failed" in output
    assert worker.run("ssh", "worker-0", "true") == (0, "")


# --- prestop.sh ------------------------------------------------------------------------------------------------------


def start_agent(worker: Pod, rank: str) -> subprocess.Popen[str]:
    """As launch/cluster.sh starts it over ssh, with one rank that runs a Python program. It tells how it ended."""
    (worker.tmp / "rank.py").write_text(rank)
    plan = {
        "directory": "/tmp",
        "command": ["python", "/tmp/rank.py"],
        "environment": {},
        "ranks": [{"HOROVOD_RANK": "0"}],
    }
    (worker.tmp / "plan").write_text(json.dumps({**plan, "silence_seconds": 600, "grace_seconds": 600}) + "\n")
    worker.tmp.chmod(0o777)
    # The shell names agent.py within its command, as ssh's login shells do.
    agent = "python /opt/job/launch/hosts/agent.py < <(cat /tmp/plan; exec sleep 999)"
    process = worker.popen("bash", "-c", f"{agent}; echo the agent has ended; exit")
    until((worker.tmp / "ready").exists, "the rank has not started")
    return process


def test_ranks_of_a_pod_that_goes_get_the_signal_and_the_time_to_save(worker: Pod) -> None:
    agent = start_agent(
        worker,
        "import signal, sys, time\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])\n"
        "open('/tmp/ready', 'w').close()\n"
        "signal.sigwait([signal.SIGTERM])\n"
        "time.sleep(0.5)\n"  # the checkpoint
        "open('/tmp/saved', 'w').close()\n"
        "sys.exit(75)\n",
    )
    hook = WORKER["lifecycle"]["preStop"]["exec"]["command"]
    assert worker.run(*hook) == (0, "")
    assert (worker.tmp / "saved").exists(), "the hook did not wait for the rank"
    assert agent.stdout and [agent.stdout.readline() for _ in range(2)] == [
        '{"rank": 0, "code": 75}\n',
        "the agent has ended\n",
    ]
    assert (worker.tmp / "job-leaving").exists()


def test_a_pod_without_ranks_goes_at_once_and_a_stuck_rank_holds_it_no_longer_than_it_may(worker: Pod) -> None:
    worker.tmp.chmod(0o777)
    assert worker.run("/opt/job/launch/kubernetes/prestop.sh") == (0, "")
    stuck = "import signal, time\nsignal.signal(15, signal.SIG_IGN)\nopen('/tmp/ready', 'w').close()\ntime.sleep(999)\n"
    agent = start_agent(worker, stuck)
    assert worker.run("/opt/job/launch/kubernetes/prestop.sh", "1") == (0, "")
    assert agent.poll() is None


# --- launcher.sh, over real ssh; cluster.sh is played by a script that ends as told -----------------------------------


def launch(worker: Pod) -> tuple[int, str]:
    return worker.run(LAUNCHER, "/tmp/hostfile", "--config=smoke.yaml", "run.resume=auto")


def test_arguments_reach_cluster_sh_and_success_ends_it(worker: Pod) -> None:
    outcomes(worker, "exit 0")
    assert launch(worker) == (0, "")
    assert calls(worker) == ["-x NUMBA_CACHE_DIR /tmp/hostfile --config=smoke.yaml run.resume=auto"]


def test_a_preempted_job_goes_on(worker: Pod) -> None:
    outcomes(worker, "exit 75", "exit 75", "exit 0")
    code, output = launch(worker)
    assert (code, len(calls(worker))) == (0, 3), output


@pytest.mark.parametrize("code", [1, 2])
def test_a_failure_is_not_repeated_not_even_by_a_launcher_pod_that_replaces_this_one(worker: Pod, code: int) -> None:
    outcomes(worker, f"exit {code}", "exit 0")
    assert launch(worker)[0] == code
    second, output = launch(worker)
    assert second == 1 and "has failed in an earlier launcher pod" in output
    assert len(calls(worker)) == 1


def test_a_failure_after_a_worker_was_replaced_is_not_the_jobs_own_and_goes_on(worker: Pod) -> None:
    outcomes(worker, "rm /tmp/job-here; exit 1", "exit 0")  # a new pod has a new /tmp
    code, output = launch(worker)
    assert (code, len(calls(worker))) == (0, 2), output
    assert "a worker is gone" in output


def test_a_failure_while_a_worker_leaves_waits_for_its_replacement(worker: Pod) -> None:
    outcomes(worker, "touch /tmp/job-leaving; exit 1", "exit 0")
    launcher = worker.popen(LAUNCHER, "/tmp/hostfile")
    assert launcher.stdout and "a worker is gone" in launcher.stdout.readline()
    asked = sessions(worker)
    until(lambda: sessions(worker) >= asked + 4 or launcher.poll() is not None, "it does not ask the worker again")
    assert len(calls(worker)) == 1, "it came back to a pod that leaves"
    (worker.tmp / "job-leaving").unlink()
    assert launcher.wait(PATIENCE) == 0
    assert len(calls(worker)) == 2


def test_a_launcher_pod_that_is_asked_to_go_passes_it_on_and_starts_nothing_new(worker: Pod) -> None:
    # 143 is how cluster.sh ends when the ranks had no time for a checkpoint. That is no failure of the job.
    outcomes(worker, "trap 'exit 143' TERM; touch /tmp/started; while true; do sleep 0.05; done", "exit 0")
    shell = worker.popen("bash", "-c", f"{LAUNCHER} /tmp/hostfile & echo $! >/tmp/pid; wait $!")
    until((worker.tmp / "started").exists, "cluster.sh has not started")
    worker.run("bash", "-c", "kill -TERM $(</tmp/pid)")
    assert shell.wait(PATIENCE) == 75
    assert len(calls(worker)) == 1
    assert not (worker.tmp / "job-failed").exists(), "the pod that replaces it would refuse to go on"


def test_a_launcher_pod_that_waits_for_workers_goes_when_asked_to(worker: Pod) -> None:
    (worker.tmp / "hostfile").write_text("worker-0 slots=1\nworker-7 slots=1\n")
    shell = worker.popen("bash", "-c", f"{LAUNCHER} /tmp/hostfile & echo $! >/tmp/pid; wait $!")
    until((worker.tmp / "job-here").exists, "it does not look for workers")
    worker.run("bash", "-c", "kill -TERM $(</tmp/pid)")
    assert shell.wait(PATIENCE) == 75


def test_workers_that_do_not_come_back_end_it_in_time_and_are_named(worker: Pod) -> None:
    outcomes(worker, "exit 0")
    (worker.tmp / "hostfile").write_text("worker-0 slots=1\nworker-7 slots=1\n")
    code, output = worker.run("env", "JOB_WORKERS_TIMEOUT_SECONDS=1", LAUNCHER, "/tmp/hostfile")
    assert code == 1 and "within 1 s not all workers answered: worker-0 worker-7" in output
    assert calls(worker) == []


def test_a_worker_on_which_ranks_of_an_earlier_launcher_end_is_waited_for(worker: Pod) -> None:
    outcomes(worker, "exit 0")
    stuck = "import signal, time\nsignal.signal(15, signal.SIG_IGN)\nopen('/tmp/ready', 'w').close()\ntime.sleep(999)\n"
    start_agent(worker, stuck)
    launcher = worker.popen(LAUNCHER, "/tmp/hostfile")
    asked = sessions(worker)
    until(lambda: sessions(worker) >= asked + 4 or launcher.poll() is not None, "it does not ask the worker again")
    assert calls(worker) == [], "two agents would share the GPUs and the run's folder"
    worker.run("bash", "-c", "kill -9 $(grep -slzxE '.*/agent[.]py' /proc/[0-9]*/cmdline | cut -d / -f 3)")
    assert launcher.wait(PATIENCE) == 0


def test_without_a_hostfile_it_says_what_it_wants(worker: Pod) -> None:
    code, output = worker.run(LAUNCHER, "/etc/mpi/hostfile")
    assert code == 2 and "cannot read the hostfile '/etc/mpi/hostfile'" in output


# --- launcher.sh --min-np ---------------------------------------------------------------------------------------------


@pytest.fixture
def elastic(worker: Pod) -> Pod:
    """One of two workers that are listed, as the operator does."""
    (worker.tmp / "hostfile").write_text("worker-0 slots=2\nworker-7 slots=2\n")
    discover = worker.tmp / "discover_hosts.sh"
    discover.write_text("#!/bin/sh\necho worker-0\n")
    discover.chmod(0o755)
    return worker


ELASTIC = ["env", "JOB_WORKERS_TIMEOUT_SECONDS=1", "JOB_MORE_WORKERS_SECONDS=0", LAUNCHER, "--min-np"]
FOLLOWED = "--discover /tmp/discover_hosts.sh --slots-per-host 2 -x NUMBA_CACHE_DIR /tmp/hostfile"


def test_an_elastic_job_begins_with_enough_workers_and_cluster_sh_follows_the_operators_list(elastic: Pod) -> None:
    outcomes(elastic, "exit 75", "exit 0")  # the first as after elastic.timeout_seconds with too few
    code, output = elastic.run(*ELASTIC, "2", "--max-np", "8", "/tmp/hostfile", "run.resume=auto")
    assert code == 0, output
    assert calls(elastic) == [f"--min-np 2 --max-np 8 {FOLLOWED} run.resume=auto"] * 2
    assert "preempted; going on when enough workers are ready" in output


def test_an_elastic_job_waits_for_more_workers_than_it_needs_but_not_for_ever(elastic: Pod) -> None:
    outcomes(elastic, "exit 0")
    code, output = elastic.run("env", "JOB_MORE_WORKERS_SECONDS=1", LAUNCHER, "--min-np", "1", "/tmp/hostfile")
    assert code == 0 and "1 of 2 workers answer, which are enough; waiting 1 s for the others" in output


def test_an_elastic_job_with_too_few_workers_ends_in_time(elastic: Pod) -> None:
    code, output = elastic.run(*ELASTIC, "3", "/tmp/hostfile")
    assert code == 1 and "within 1 s not enough workers answered: worker-0 worker-7" in output
    assert calls(elastic) == []


def test_a_failure_of_an_elastic_job_is_final_though_a_worker_is_missing_all_the_while(elastic: Pod) -> None:
    outcomes(elastic, "rm /tmp/job-here; exit 1", "exit 1", "exit 0")  # first a new pod has taken the place of a worker
    code, output = elastic.run(*ELASTIC, "1", "/tmp/hostfile")
    assert (code, len(calls(elastic))) == (1, 2), output
    assert (elastic.tmp / "job-failed").exists()


def test_workers_that_the_operator_adds_or_removes_are_seen_between_two_runs(worker: Pod) -> None:
    (worker.tmp / "hostfile").write_text("worker-0 slots=1\nworker-7 slots=1\n")
    outcomes(worker, "exit 0")
    launcher = worker.popen(LAUNCHER, "/tmp/hostfile")
    until((worker.tmp / "job-here").exists, "it does not look for workers")
    (worker.tmp / "hostfile").write_text("worker-0 slots=1\n")
    assert launcher.wait(PATIENCE) == 0


@pytest.mark.parametrize(
    "words", [["--min-np"], ["--min-np", "0", "/tmp/hostfile"], ["--max-np", "x", "/tmp/hostfile"]]
)
def test_a_number_of_ranks_that_is_none_is_told(worker: Pod, words: list[str]) -> None:
    code, output = worker.run(LAUNCHER, *words)
    assert code == 2 and f"{words[0]} takes a number of ranks" in output


# --- indexed.sh ------------------------------------------------------------------------------------------------------

INDEXED = "/opt/job/launch/kubernetes/indexed.sh"


def test_a_pod_of_the_elastic_indexed_job_answers_until_it_is_asked_to_go(tmp_path: Path, keys: Path) -> None:
    told = ["JOB_COMPLETION_INDEX=1", "JOB_HOSTS=2", "JOB_RANKS_PER_HOST=1", "JOB_COORDINATOR=train-0.train"]
    with Pod(tmp_path, keys, ["env", *told, INDEXED, "--min-np", "1", "run.resume=auto"]) as pod:
        pod.until("ssh", "worker-0", "true")
        pod.terminate()
        assert pod.wait() == 75, "what podFailurePolicy forgives"
        assert (pod.tmp / "job-leaving").exists()


def test_a_pod_that_is_not_told_which_one_it_is_says_so(worker: Pod) -> None:
    code, output = worker.run("env", "JOB_COMPLETION_INDEX=1", "JOB_HOSTS=2", INDEXED)
    assert code == 2 and "JOB_RANKS_PER_HOST is not set" in output


# --- TensorBoard -----------------------------------------------------------------------------------------------------


def test_tensorboard_answers_its_probes_from_a_read_only_pod(tmp_path: Path, keys: Path) -> None:
    container = manifest("base/tensorboard.yaml", "Deployment")["spec"]["template"]["spec"]["containers"][0]
    path = container["readinessProbe"]["httpGet"]["path"]
    (tmp_path / "claim" / "tensorboard").mkdir(parents=True)
    ask = f"import urllib.request as r; print(r.urlopen('http://127.0.0.1:6006{path}', timeout=5).status)"
    with Pod(tmp_path / "pod", keys, container["command"], runs=tmp_path / "claim") as pod:
        assert pod.until("python", "-c", ask) == "200\n"
