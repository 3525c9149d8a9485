"""An Indexed Job without its cluster: two pods are two processes on the loopback, each with its own environment.

What Kubernetes does is left to the test: it starts the pods in any order, and starts them again after exit code 75.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Optional

import psutil
import pytest

from tests import synthetic
from tests.faults.conftest import Ended, finish, wait_for_line
from tests.parallel.conftest import ROOT, free_port
from tests.parallel.runs import weights_of_one_rank

PATIENCE = 200.0  # seconds; four ranks on two cores take 20 to start
Pod = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def pod(tmp_path: Path, run_dir: Path, port: int) -> Iterator[Pod]:
    """``pod(index, *overrides, ranks=1)`` starts a pod. Whatever it left is ended after the test."""
    data = synthetic.write(tmp_path / "data")
    job = {"JOB_HOSTS": "2", "JOB_COORDINATOR": "127.0.0.1", "JOB_COORDINATOR_PORT": str(port)}
    started = []

    def start(index: int, *overrides: str, ranks: int = 1) -> subprocess.Popen[str]:
        own = {"JOB_COMPLETION_INDEX": str(index), "JOB_RANKS_PER_HOST": str(ranks), "OMP_NUM_THREADS": "1"}
        options = ["train.log_every_steps=1", "run.step_timeout_seconds=60", f"run.dir={run_dir}", *overrides]
        started.append(
            subprocess.Popen(
                [sys.executable, str(ROOT / "launch" / "rank.py"), *data, *options],
                env={**os.environ, **job, **own},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        )
        return started[-1]

    yield start
    for process in [*started, *ranks(run_dir)]:
        process.kill()
    for process in started:
        process.communicate()


def ranks(run_dir: Path, rank: Optional[int] = None) -> list[psutil.Process]:
    """The ranks that run into this folder, or the one of that number."""
    found = []
    for process in psutil.process_iter(["cmdline", "environ"]):
        own = (process.info["environ"] or {}).get("HOROVOD_RANK")
        if own and f"run.dir={run_dir}" in process.info["cmdline"] and rank in (None, int(own)):
            found.append(process)
    return found


def ended(*pods: subprocess.Popen[str]) -> list[Ended]:
    return [finish(pod, PATIENCE) for pod in pods]


def records(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_pod_that_is_first_waits_for_the_coordinator_and_both_train_together(
    pod: Pod, run_dir: Path, port: int
) -> None:
    second = pod(1, "train.max_steps=5")
    with socket.create_server(("127.0.0.1", port)) as nobody:
        nobody.settimeout(60)
        nobody.accept()[0].close()  # it has asked, and was not answered
    first = pod(0, "train.max_steps=5")
    results = ended(first, second)
    assert [result.code for result in results] == [0, 0], results
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["ranks"], summary["steps"]) == (2, 5)


@pytest.mark.slow
def test_two_pods_of_two_ranks_are_preempted_and_go_on_with_one_each_to_the_same_bits(pod: Pod, run_dir: Path) -> None:
    options = ["train.max_steps=40", "train.epochs=100", "checkpoint.every_steps=null"]
    first, second = (pod(index, *options, ranks=2) for index in (0, 1))
    output = wait_for_line(first, "step 3/")
    second.send_signal(signal.SIGTERM)
    results = ended(first, second)
    assert [result.code for result in results] == [75, 75], (output, results)
    assert "received SIGTERM" in results[0].output

    second = pod(1, *options)  # comes back first
    first = pod(0, *options)
    results = ended(first, second)
    assert [result.code for result in results] == [0, 0], results
    assert "going on after step" in results[0].output
    assert [record["step"] for record in records(run_dir) if record["split"] == "train"] == list(range(1, 41))
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["ranks"] == 2
    assert summary["weights_sha256"] == weights_of_one_rank(run_dir)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_both_pods_with_1(pod: Pod, run_dir: Path, victim: int) -> None:
    pods = [pod(index, "train.epochs=1000", ranks=2) for index in (0, 1)]
    wait_for_line(pods[0], "step 3/")
    assert len(ranks(run_dir)) == 4
    ranks(run_dir, 2 * victim + 1)[0].kill()
    results = ended(*pods)
    assert [result.code for result in results] == [1, 1], results
    assert f"rank {2 * victim + 1}: ended by SIGKILL" in results[victim].output
    assert not ranks(run_dir)


@pytest.mark.slow
def test_a_bad_configuration_ends_every_pod_with_2_before_any_rank_starts(pod: Pod, run_dir: Path) -> None:
    results = ended(pod(0, "train.epochs=0"), pod(1, "train.epochs=0"))
    assert [result.code for result in results] == [2, 2], results
    assert all("train.epochs" in result.output for result in results)
    assert not run_dir.exists()
