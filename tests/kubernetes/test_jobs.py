"""Whole jobs in pods of namespaces, each with an address of its own: what the manifests start, and preemption.

The test is the operator and Kubernetes: it starts pods and replaces those that were put out. All else is real, at the
containers' arguments and the size of the data as only difference from the manifests.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests import synthetic
from tests.kubernetes.pod import PATIENCE, Pod, make_keys, manifest, unavailable

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(unavailable()), reason=unavailable())]

NAMES = ["worker-0", "worker-1", "launcher"]
ADDRESSES = {name: f"10.77.0.{number}" for number, name in enumerate(NAMES, start=1)}
HOSTS = "127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in ADDRESSES.items())
STEPS = 6 * 20  # of synthetic data


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=30)


@pytest.fixture
def networks() -> Iterator[dict[str, str]]:
    """A network namespace for each pod, by the pod's name; a bridge in one more joins them."""
    prefix = f"job{os.getpid()}"
    names = {name: f"{prefix}-{name}" for name in [*NAMES, "hub"]}
    hub = names["hub"]
    try:
        for network in names.values():
            ip("netns", "add", network)
        ip("-n", hub, "link", "add", "bridge", "type", "bridge")
        ip("-n", hub, "link", "set", "bridge", "up")
        for number, (name, address) in enumerate(ADDRESSES.items()):
            pod = names[name]
            ip("-n", hub, "link", "add", f"port{number}", "type", "veth", "peer", "name", "eth0", "netns", pod)
            ip("-n", hub, "link", "set", f"port{number}", "master", "bridge", "up")
            ip("-n", pod, "address", "add", f"{address}/24", "dev", "eth0")
            ip("-n", pod, "link", "set", "eth0", "up")
        yield names
    finally:
        for network in names.values():
            subprocess.run(["ip", "netns", "delete", network], capture_output=True, timeout=30)


class Cluster:
    """Pods with the parts that they share: the claim, the keys, the names of each other."""

    def __init__(self, folder: Path, networks: dict[str, str]) -> None:
        self._folder, self._networks = folder, networks
        self._keys = make_keys(folder / "ssh")
        self._made = 0
        self.claim = folder / "claim"
        self.run = self.claim / "fashion-mnist"
        self.overrides = [
            argument.replace(str(self.claim), "/runs") for argument in synthetic.write(self.claim / "data")
        ]
        self.overrides += [f"train.epochs={STEPS // 6}", "train.log_every_steps=1", "run.step_timeout_seconds=30"]

    def pod(self, name: str, command: Sequence[str], hosts: str = HOSTS) -> Pod:
        self._made += 1
        folder = self._folder / f"{self._made}-{name}"
        pod = Pod(folder, self._keys, command, network=self._networks[name], hosts=hosts, runs=self.claim, name=name)
        (pod.tmp / "hostfile").write_text("worker-0 slots=1\nworker-1 slots=1\n")
        return pod

    def steps(self) -> list[int]:
        """Of training, as recorded."""
        file = self.run / "metrics.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        return [record["step"] for record in map(json.loads, lines) if record["split"] == "train"]

    def assert_whole(self) -> None:
        """All steps were taken once, in their order, by two ranks."""
        assert self.steps() == list(range(1, STEPS + 1))
        assert json.loads((self.run / "summary.json").read_text())["ranks"] == 2


@pytest.fixture
def cluster(tmp_path: Path, networks: dict[str, str]) -> Cluster:
    return Cluster(tmp_path, networks)


def until(condition: Callable[[], bool], pod: Pod) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, pod.text()
        time.sleep(0.05)


def test_an_mpijob_goes_on_after_a_worker_was_put_out_and_replaced(cluster: Cluster) -> None:
    replicas = manifest("mpijob/mpijob.yaml", "MPIJob")["spec"]["mpiReplicaSpecs"]
    worker, launcher = (replicas[role]["template"]["spec"]["containers"][0] for role in ("Worker", "Launcher"))
    program, _ = launcher["command"]
    command = [program, "/tmp/hostfile", *launcher["args"], *cluster.overrides]
    with cluster.pod("worker-0", worker["command"]), cluster.pod("launcher", command) as launched:
        with cluster.pod("worker-1", worker["command"]) as leaving:
            until(lambda: len(cluster.steps()) > 5, launched)
            assert leaving.run(*worker["lifecycle"]["preStop"]["exec"]["command"]) == (0, "")
            leaving.terminate()
            leaving.wait()
        saved = len(cluster.steps())
        assert 5 < saved < STEPS, "it was over too soon to be preempted"
        with cluster.pod("worker-1", worker["command"]):
            assert launched.wait() == 0, launched.text()
    assert "preempted; going on when all workers are ready" in launched.text()
    cluster.assert_whole()


def test_an_indexed_job_goes_on_after_a_pod_was_put_out_and_all_were_replaced(cluster: Cluster) -> None:
    container = manifest("overlays/indexed-job/job.yaml", "Job")["spec"]["template"]["spec"]["containers"][0]
    variables = {variable["name"]: variable["value"] for variable in container["env"]}
    hosts = HOSTS.replace("worker-0", f"worker-0 {variables['JOB_COORDINATOR']}")
    program = container["command"] if shutil.which("tini") else container["command"][2:]

    def pod(index: int) -> Pod:
        told = [f"{name}={value}" for name, value in {**variables, "JOB_COMPLETION_INDEX": index}.items()]
        return cluster.pod(f"worker-{index}", ["env", *told, *program, *container["args"], *cluster.overrides], hosts)

    with pod(1) as second, pod(0) as first:
        until(lambda: len(cluster.steps()) > 5, first)
        second.terminate()
        assert (first.wait(), second.wait()) == (75, 75), first.text() + second.text()
    assert 5 < len(cluster.steps()) < STEPS, "it was over too soon to be preempted"
    with pod(0) as first, pod(1) as second:
        assert (first.wait(), second.wait()) == (0, 0), first.text() + second.text()
    cluster.assert_whole()
