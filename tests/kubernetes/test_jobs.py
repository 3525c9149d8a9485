"""Whole jobs in pods of namespaces, each with an address of its own: what the manifests start, and preemption.

The test is the operator and Kubernetes: it starts pods and replaces those that were put out. All else is real, at the
containers' arguments and the size of the data as only difference from the manifests.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import synthetic
from tests.kubernetes.pod import KUBERNETES, PATIENCE, ROOT, Pod, make_keys, manifest, unavailable

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(bool(unavailable()), reason=unavailable()),
]

NAMES = ["worker-0", "worker-1", "worker-2", "launcher"]
ADDRESSES = {name: f"10.77.0.{number}" for number, name in enumerate(NAMES, start=1)}
HOSTS = "127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in ADDRESSES.items())
STEPS = 6 * 20  # of synthetic data
ELASTIC = [  # arguments of a job that does not end by itself, and has little on the disk
    "train.epochs=100000", "checkpoint.every_steps=null", "elastic.commit_every_steps=2", "elastic.cooldown_seconds=2",
]  # fmt: skip
KEPT = ["env", "NUMBA_CACHE_DIR=/runs/numba"]  # what is compiled is kept for all pods: to be done sooner
CHANGE_SECONDS = 200.0  # for ranks to begin, which compile first, or to go on; a passing test waits less


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


def replace(file: Path, text: str) -> None:
    """So that whoever runs it finds the old or the new one, as when the kubelet brings a ConfigMap up to date."""
    new = file.with_suffix(".new")
    new.write_text(text)
    new.chmod(0o555)
    new.rename(file)


def listing(*names: str) -> str:
    """The operator's discover_hosts.sh."""
    return "#!/bin/sh\n" + "".join(f"echo {name}\n" for name in names)


def has_agent(pod: Pod) -> bool:
    """Whether launch/cluster.sh runs something in it."""
    agent = r"grep -sqzxE '.*/launch/hosts/agent[.]py' /proc/[0-9]*/cmdline"
    return pod.run("bash", "-c", agent)[0] == 0


def elastic_launcher() -> list[str]:
    """The command of the launcher in the overlay, but for the folder of the operator's files."""
    (command,) = (
        patch["value"]
        for patch in patches_of("elastic")
        if patch["path"].endswith("/Launcher/template/spec/containers/0/command")
    )
    return [word.replace("/etc/mpi", "/tmp") for word in command]


def patches_of(overlay: str) -> Any:
    """The first that it makes."""
    kustomization = yaml.safe_load((KUBERNETES / "overlays" / overlay / "kustomization.yaml").read_text())
    return yaml.safe_load(kustomization["patches"][0]["patch"])


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
        self.overrides += [f"train.epochs={STEPS // 6}", "train.log_every_steps=1", "run.step_timeout_seconds=120"]

    def pod(self, name: str, command: Sequence[str], hosts: str = HOSTS) -> Pod:
        self._made += 1
        folder = self._folder / f"{self._made}-{name}"
        pod = Pod(folder, self._keys, command, network=self._networks[name], hosts=hosts, runs=self.claim, name=name)
        (pod.tmp / "hostfile").write_text("worker-0 slots=1\nworker-1 slots=1\n")
        replace(pod.tmp / "discover_hosts.sh", listing("worker-0", "worker-1"))
        return pod

    def steps(self) -> list[int]:
        """Of training, as recorded."""
        file = self.run / "metrics.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        return [record["step"] for record in map(json.loads, lines) if record["split"] == "train"]

    def changes(self) -> list[dict[str, Any]]:
        """Of the ranks, as recorded."""
        file = self.run / "changes.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def newest_weights(self, run: Path) -> tuple[int, str]:
        """After how many steps, and their SHA-256."""
        manifest = json.loads((max((run / "checkpoints").iterdir()) / "manifest.json").read_text())
        return manifest["step"], manifest["weights_sha256"]

    def assert_as_if_nothing_had_happened(self, arguments: Sequence[str]) -> None:
        """One rank in one process, which nobody disturbs, takes as many steps."""
        steps, weights = self.newest_weights(self.run)
        assert self.steps() == list(range(1, steps + 1))
        alone = self.claim / "alone"
        here = [argument.replace("/opt/job", str(ROOT)).replace("/runs", str(self.claim)) for argument in arguments]
        overrides = [f"run.dir={alone}", f"train.max_steps={steps}", "run.resume=never"]
        command = [sys.executable, str(ROOT / "job" / "train.py"), *here, *overrides]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=300)
        assert self.newest_weights(alone) == (steps, weights)

    def assert_whole(self) -> None:
        """All steps were taken once, in their order, by two ranks."""
        assert self.steps() == list(range(1, STEPS + 1))
        assert json.loads((self.run / "summary.json").read_text())["ranks"] == 2


@pytest.fixture
def cluster(tmp_path: Path, networks: dict[str, str]) -> Cluster:
    return Cluster(tmp_path, networks)


def until(condition: Callable[[], bool], pod: Pod, seconds: float = PATIENCE) -> None:
    end = time.monotonic() + seconds
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
            until(lambda: len(cluster.steps()) > 5, launched, CHANGE_SECONDS)
            assert leaving.run(*worker["lifecycle"]["preStop"]["exec"]["command"]) == (0, "")
            leaving.terminate()
            leaving.wait()
        saved = len(cluster.steps())
        assert 5 < saved < STEPS, "it was over too soon to be preempted"
        with cluster.pod("worker-1", worker["command"]):
            assert launched.wait(CHANGE_SECONDS) == 0, launched.text()
    assert "preempted; going on when all workers are ready" in launched.text()
    cluster.assert_whole()


def test_an_elastic_mpijob_grows_and_shrinks_with_its_workers_and_ends_with_the_same_bits(cluster: Cluster) -> None:
    replicas = manifest("mpijob/mpijob.yaml", "MPIJob")["spec"]["mpiReplicaSpecs"]
    worker, launcher = (replicas[role]["template"]["spec"]["containers"][0] for role in ("Worker", "Launcher"))
    arguments = [*launcher["args"], *cluster.overrides, *ELASTIC]
    program = [*KEPT, *elastic_launcher()]

    def changed(times: int, ranks: int) -> None:
        until(lambda: len(cluster.changes()) == times, launched, CHANGE_SECONDS)
        assert cluster.changes()[-1]["ranks"] == ranks, launched.text()

    def put_out(pod: Pod) -> None:
        assert pod.run(*worker["lifecycle"]["preStop"]["exec"]["command"]) == (0, "")
        pod.terminate()
        pod.wait()

    with contextlib.ExitStack() as stack:
        pods = [stack.enter_context(cluster.pod(f"worker-{number}", worker["command"])) for number in (0, 1)]
        launched = stack.enter_context(cluster.pod("launcher", [*program, *arguments]))
        until(lambda: len(cluster.steps()) > 5, launched, CHANGE_SECONDS)

        pods[1].__exit__()  # its node dies
        changed(1, ranks=1)
        stack.enter_context(cluster.pod("worker-1", worker["command"]))
        changed(2, ranks=2)

        put_out(pods[0])  # with rank 0
        changed(3, ranks=1)
        stack.enter_context(cluster.pod("worker-0", worker["command"]))  # under the same name, and always listed
        changed(4, ranks=2)

        added = stack.enter_context(cluster.pod("worker-2", worker["command"]))
        replace(launched.tmp / "discover_hosts.sh", listing("worker-0", "worker-1", "worker-2"))
        changed(5, ranks=3)
        put_out(added)
        changed(6, ranks=2)

        launched.terminate()
        assert launched.wait() == 75, launched.text()
    why = [change["why"] for change in cluster.changes()]
    assert why[0].startswith("worker-1 was lost") and why[1] == "worker-1 joined"
    assert why[2:] == ["worker-0 left", "worker-0 joined", "worker-2 joined", "worker-2 left"]
    assert [change["replayed_steps"] for change in cluster.changes()][1:] == [0] * 5
    cluster.assert_as_if_nothing_had_happened(arguments)


def test_an_indexed_job_goes_on_after_a_pod_was_put_out_and_all_were_replaced(cluster: Cluster) -> None:
    container = manifest("overlays/indexed-job/job.yaml", "Job")["spec"]["template"]["spec"]["containers"][0]
    variables = {variable["name"]: variable["value"] for variable in container["env"]}
    hosts = HOSTS.replace("worker-0", f"worker-0 {variables['JOB_COORDINATOR']}")
    program = container["command"] if shutil.which("tini") else container["command"][2:]

    def pod(index: int) -> Pod:
        told = [f"{name}={value}" for name, value in {**variables, "JOB_COMPLETION_INDEX": index}.items()]
        return cluster.pod(f"worker-{index}", ["env", *told, *program, *container["args"], *cluster.overrides], hosts)

    with pod(1) as second, pod(0) as first:
        until(lambda: len(cluster.steps()) > 5, first, CHANGE_SECONDS)
        second.terminate()
        assert (first.wait(), second.wait()) == (75, 75), first.text() + second.text()
    assert 5 < len(cluster.steps()) < STEPS, "it was over too soon to be preempted"
    with pod(0) as first, pod(1) as second:
        assert (first.wait(CHANGE_SECONDS), second.wait()) == (0, 0), first.text() + second.text()
    cluster.assert_whole()


def test_an_elastic_indexed_job_goes_on_when_a_pod_is_killed_put_out_or_was_pod_0(cluster: Cluster) -> None:
    container = manifest("overlays/indexed-job/job.yaml", "Job")["spec"]["template"]["spec"]["containers"][0]
    variables = {variable["name"]: variable["value"] for variable in container["env"]}
    hosts = "".join(f"{ADDRESSES[f'worker-{index}']} fashion-mnist-{index}.fashion-mnist\n" for index in range(2))
    job = patches_of("indexed-job-elastic")
    program = job["spec"]["template"]["spec"]["containers"][0]["command"][0 if shutil.which("tini") else 2 :]
    arguments = [*container["args"], *cluster.overrides, *ELASTIC]

    def pod(index: int) -> Pod:
        told = [f"{name}={value}" for name, value in {**variables, "JOB_COMPLETION_INDEX": index}.items()]
        command = [*KEPT, *told, *program, *arguments]
        return stack.enter_context(cluster.pod(f"worker-{index}", command, HOSTS + hosts))

    def changed(times: int, ranks: int) -> None:
        until(lambda: len(cluster.changes()) == times, first, CHANGE_SECONDS)
        assert cluster.changes()[-1]["ranks"] == ranks, first.text()

    with contextlib.ExitStack() as stack:
        second, first = pod(1), pod(0)
        until(lambda: len(cluster.steps()) > 5, first, CHANGE_SECONDS)
        second.__exit__()  # killed, with its memory
        changed(1, ranks=1)
        second = pod(1)
        changed(2, ranks=2)

        second.terminate()
        assert second.wait() == 75, second.text()
        changed(3, ranks=1)
        second = pod(1)
        changed(4, ranks=2)

        taken = len(cluster.steps())
        until(lambda: len(cluster.steps()) > taken + 5, first, CHANGE_SECONDS)
        first.__exit__()
        until(lambda: not has_agent(second), second, CHANGE_SECONDS)
        taken = len(cluster.steps())
        saved, _ = cluster.newest_weights(cluster.run)
        assert saved >= taken - 3, "a commit every two steps, which pod 1 had"
        first = pod(0)
        until(lambda: len(cluster.steps()) > taken, first, CHANGE_SECONDS)
        assert f"going on after step {saved}" in first.text()

        first.terminate()
        assert first.wait() == 75, first.text()
        second.terminate()
        assert second.wait() == 75, second.text()
    why = [change["why"] for change in cluster.changes()]
    assert why[0].startswith("fashion-mnist-1.fashion-mnist was lost")
    assert why[1:] == [f"fashion-mnist-1.fashion-mnist {what}" for what in ("joined", "left", "joined")]
    cluster.assert_as_if_nothing_had_happened(arguments)
