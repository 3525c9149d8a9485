"""Manifests without a cluster: what is shipped is sound, and what is broken on purpose is told, with its place."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.kubernetes import validate
from launch.kubernetes.checks import manifest
from launch.kubernetes.checks.v2beta1 import MPIJob
from tests.kubernetes.pod import KUBERNETES, ROOT

OVERLAYS = sorted(folder.name for folder in (KUBERNETES / "overlays").iterdir())
VERSION = "1.31"
DELETED = object()

needs_kubectl = pytest.mark.skipif(
    not (shutil.which("kubectl") or shutil.which("kustomize")), reason="rendering needs kubectl or kustomize"
)


@cache
def rendered(overlay: str) -> list[dict[str, Any]]:
    return [*validate.read(KUBERNETES / "once"), *validate.read(KUBERNETES / "overlays" / overlay)]


def edited(overlay: str, document: str, path: str, value: Any) -> list[dict[str, Any]]:
    """A copy with one value changed, added, or ``DELETED``. ``path`` is written as problems write it."""
    documents = copy.deepcopy(rendered(overlay))
    place: Any = next(found for found in documents if manifest.name(found) == document)
    if not path:
        documents.remove(place)
        return documents
    *steps, last = [int(key) if key.isdigit() else key for key in re.findall(r"[^.\[\]]+", path)]
    for step in steps:
        place = place[step]
    if value is DELETED:
        del place[last]
    elif isinstance(place, list) and last == len(place):
        place.append(value)
    else:
        place[last] = value
    return documents


# --- what is shipped -------------------------------------------------------------------------------------------------


@needs_kubectl
@pytest.mark.parametrize(
    ("overlay", "version"), [*((overlay, VERSION) for overlay in OVERLAYS), ("cpu", "1.36"), ("indexed-job", "1.36")]
)
def test_every_overlay_is_sound(overlay: str, version: str) -> None:
    assert [str(problem) for problem in validate.problems(rendered(overlay), version)] == []


@needs_kubectl
@pytest.mark.parametrize(
    ("overlay", "pods", "ranks", "gpus"),
    [("cpu", 2, 2, 0), ("gpu-4x1", 4, 4, 4), ("gpu-2x4", 2, 8, 8), ("elastic", 2, 2, 0)],
)
def test_an_mpijob_has_the_ranks_and_gpus_that_its_name_says(overlay: str, pods: int, ranks: int, gpus: int) -> None:
    document = next(document for document in rendered(overlay) if document["kind"] == "MPIJob")
    spec = MPIJob.model_validate(document).spec
    workers = next(found for found in manifest.all_pods([document]) if found.trains)
    assert (spec.workers, spec.ranks, workers.gpus * workers.count) == (pods, ranks, gpus)


def test_removing_an_overlay_leaves_the_claim_with_all_that_runs_have_written() -> None:
    for folder in ("base", "mpijob", *(f"overlays/{overlay}" for overlay in OVERLAYS)):
        for file in (KUBERNETES / folder).glob("*.yaml"):
            assert all(document["kind"] != "PersistentVolumeClaim" for document in yaml.safe_load_all(file.read_text())
                       if document and "kind" in document)  # fmt: skip


def test_the_image_has_what_manifests_and_sshd_name() -> None:
    dockerfile = ROOT / "Dockerfile"
    if not dockerfile.exists():
        pytest.skip("there is no Dockerfile")
    text = dockerfile.read_text()
    for target in ("cpu", "gpu"):
        assert re.search(rf"(?m)^FROM .* AS {target}$", text)
    assert re.search(rf"useradd .*--uid {manifest.UID} .*mpiuser", text)
    assert re.search(rf"(?m)^USER {manifest.UID}\b", text)
    assert f"WORKDIR {manifest.IN_IMAGE.rstrip('/')}" in text
    assert "openssh-server" in text and "openssh-client" in text and "tini" in text
    assert f"COPY launch/kubernetes/sshd_config {manifest.SSHD_CONFIG}" in text
    assert "COPY launch/kubernetes/ssh_config /etc/ssh/ssh_config.d/job.conf" in text


# --- what is broken --------------------------------------------------------------------------------------------------

JOB = "MPIJob/fashion-mnist"
POD = "spec.mpiReplicaSpecs.Worker.template.spec"
WORKER = f"{POD}.containers[0]"
LAUNCHER = "spec.mpiReplicaSpecs.Launcher.template.spec.containers[0]"
INDEXED, INDEXED_POD = "Job/fashion-mnist", "spec.template.spec"
TRAINER = f"{INDEXED_POD}.containers[0]"
TENSORBOARD = "Deployment/tensorboard"

# Overlay, document, what is changed and into what; then where the problem must be seen, and words of the message.
SAME = None  # as what is changed
BROKEN = {
    # What the API server or the operator would refuse, or drop without a word.
    "a misspelt key of a core kind": ("cpu", TENSORBOARD, "spec.template.spec.containers[0].redinessProbe", {}, "spec.template.spec.containers[0]", "redinessProbe"),
    "a misspelt key of the MPIJob": ("cpu", JOB, "spec.slotPerWorker", 1, SAME, "unknown key"),
    "a misspelt key in a worker's container": ("cpu", JOB, f"{WORKER}.volumeMount", [], WORKER, "volumeMount"),
    "a number in quotes": ("cpu", JOB, "spec.slotsPerWorker", "1", SAME, "integer"),
    "another version of the MPIJob": ("cpu", JOB, "apiVersion", "kubeflow.org/v1", SAME, "kubeflow.org/v2beta1"),
    "two launchers": ("cpu", JOB, "spec.mpiReplicaSpecs.Launcher.replicas", 2, SAME, "1"),
    "no launcher": ("cpu", JOB, "spec.mpiReplicaSpecs.Launcher", DELETED, SAME, "required"),
    "no number of workers": ("cpu", JOB, "spec.mpiReplicaSpecs.Worker.replicas", DELETED, SAME, "required"),
    "a restart policy that the type has and the operator refuses": ("cpu", JOB, "spec.mpiReplicaSpecs.Worker.restartPolicy", "ExitCode", SAME, "'Never' or 'OnFailure'"),
    "an unknown clean-up": ("cpu", JOB, "spec.runPolicy.cleanPodPolicy", "Always", SAME, "'Running'"),
    "a negative time to live": ("cpu", JOB, "spec.runPolicy.ttlSecondsAfterFinished", -1, SAME, "greater than or equal to 0"),
    "a name too long for its pods": ("cpu", JOB, "metadata.name", "f" * 60, "spec", "host name"),
    "a Deployment without a container": ("cpu", TENSORBOARD, "spec.template.spec", DELETED, "spec.template.spec.containers", "is missing"),
    "a worker without a container": ("cpu", JOB, f"{POD}.containers", [], "spec.mpiReplicaSpecs.Worker.template", "a container at least"),
    # What nobody would refuse, and nothing would come of.
    "a gang of one more than there are workers": ("cpu", JOB, "spec.runPolicy.schedulingPolicy", DELETED, "spec", "minAvailable must be the number of workers, 2"),
    "more workers, and nothing else changed": ("gpu-4x1", JOB, "spec.mpiReplicaSpecs.Worker.replicas", 5, "spec", "number of workers, 5"),
    "more ranks than GPUs": ("gpu-2x4", JOB, "spec.slotsPerWorker", 8, SAME, "8 ranks a pod, but its limit nvidia.com/gpu is 4"),
    "more ranks than cores": ("cpu", JOB, "spec.slotsPerWorker", 3, SAME, "3 ranks a pod share 2 cores"),
    "a mount without its volume": ("cpu", JOB, f"{WORKER}.volumeMounts[0].name", "run", SAME, "no volume 'run'"),
    "a volume that nobody mounts": ("cpu", JOB, f"{POD}.volumes[3]", {"name": "data", "emptyDir": {}}, SAME, "mounted nowhere"),
    "a mount over the operator's keys": ("cpu", JOB, f"{WORKER}.volumeMounts[2].mountPath", "/home/mpiuser/.ssh", SAME, "mounted already"),
    "a claim that is not there": ("cpu", JOB, f"{POD}.volumes[0].persistentVolumeClaim.claimName", "run", f"{POD}.volumes[0]", "no PersistentVolumeClaim run"),
    "a claim for one node": ("cpu", "PersistentVolumeClaim/runs", "spec.accessModes", ["ReadWriteOnce"], SAME, "3 pods mount it"),
    "a priority class that is not there": ("cpu", JOB, f"{POD}.priorityClassName", "urgent", SAME, "no PriorityClass urgent"),
    "no service account": ("cpu", "ServiceAccount/training", "", DELETED, "serviceAccountName", "names no ServiceAccount"),
    "a token for Kubernetes": ("cpu", JOB, f"{POD}.automountServiceAccountToken", DELETED, SAME, "must be false"),
    "root": ("cpu", JOB, f"{POD}.securityContext.runAsUser", 0, SAME, "must be 1000, is 0"),
    "capabilities kept": ("cpu", TENSORBOARD, "spec.template.spec.containers[0].securityContext.capabilities", DELETED, SAME, "['ALL']"),
    "a folder of the node": ("cpu", JOB, f"{POD}.volumes[2]", {"name": "tmp", "hostPath": {"path": "/tmp"}}, f"{POD}.volumes[2].hostPath", "forbidden"),
    "no limit of memory": ("cpu", JOB, f"{WORKER}.resources.limits.memory", DELETED, f"{WORKER}.resources", "memory needs a request and a limit"),
    "a quantity that is none": ("cpu", JOB, f"{WORKER}.resources.limits.cpu", "two", SAME, "no quantity"),
    "a size that is none": ("cpu", JOB, f"{POD}.volumes[1].emptyDir.sizeLimit", "half", SAME, "no quantity"),
    "more asked for than allowed": ("cpu", JOB, f"{WORKER}.resources.requests.cpu", "2500m", SAME, "more than its limit"),
    "shared memory larger than memory": ("cpu", JOB, f"{POD}.volumes[1].emptyDir.sizeLimit", "4Gi", f"{WORKER}.volumeMounts[1]", "sizeLimit below"),
    "shared memory on disk": ("cpu", JOB, f"{POD}.volumes[1].emptyDir", {"sizeLimit": "1Gi"}, f"{WORKER}.volumeMounts[1]", "medium: Memory"),
    "another port than sshd's": ("cpu", JOB, f"{WORKER}.ports[0].containerPort", 22, f"{WORKER}.ports", "sshd_config has port 2222, the container 22"),
    "a probe of a port that is not there": ("cpu", JOB, f"{WORKER}.readinessProbe.tcpSocket.port", "sshd", SAME, "no port sshd"),
    "no readiness": ("cpu", JOB, f"{WORKER}.readinessProbe", DELETED, SAME, "sshd needs one"),
    "sshd with its own configuration": ("cpu", JOB, f"{WORKER}.command", ["/usr/sbin/sshd", "-De"], SAME, "-f /home/mpiuser/.sshd_config"),
    "keys mounted where sshd does not look": ("cpu", JOB, "spec.sshAuthMountPath", "/root/.ssh", SAME, "/home/mpiuser/.ssh"),
    "ranks that nobody tells to stop": ("cpu", JOB, f"{WORKER}.lifecycle", DELETED, f"{WORKER}.lifecycle.preStop", "without a checkpoint"),
    "no time for a checkpoint": ("cpu", JOB, f"{POD}.terminationGracePeriodSeconds", DELETED, SAME, "30 s are too short"),
    "an image that nobody builds": ("cpu", JOB, f"{WORKER}.image", "horovod-gluon-job:latest", SAME, "none of horovod-gluon-job:cpu"),
    "the image without CUDA on GPUs": ("gpu-4x1", JOB, f"{WORKER}.image", "horovod-gluon-job:cpu", SAME, "belong together"),
    "a command that the image has not": ("cpu", JOB, f"{LAUNCHER}.command[0]", "/opt/job/launch/launcher.sh", f"{LAUNCHER}.command", "is not in the image"),
    "a config file that is not there": ("cpu", JOB, f"{LAUNCHER}.args[0]", "--config=/opt/job/configs/smok.yaml", f"{LAUNCHER}.args", "no such config file"),
    "a misspelt override": ("cpu", JOB, f"{LAUNCHER}.args[1]", "run.folder=/runs/x", f"{LAUNCHER}.args", "run.folder: unknown key"),
    "a run that does not resume": ("cpu", JOB, f"{LAUNCHER}.args[2]", "run.resume=never", f"{LAUNCHER}.args", "would not go on"),
    "a run beside the claim": ("cpu", JOB, f"{LAUNCHER}.args[1]", "run.dir=/tmp/run", f"{LAUNCHER}.args", "on no claim of the ranks' pods (/runs)"),
    "a claim that ranks may only read": ("cpu", JOB, f"{WORKER}.volumeMounts[0].readOnly", True, f"{LAUNCHER}.args", "on no claim"),
    "GPUs that training does not use": ("gpu-4x1", JOB, f"{LAUNCHER}.args[3]", "run.device=cpu", f"{LAUNCHER}.args", "run.device=cpu, but"),
    "a batch too small for the ranks": ("gpu-2x4", JOB, f"{LAUNCHER}.args[4]", "data.global_batch=7", f"{LAUNCHER}.args", "7 is too small for 8 ranks"),
    "a Service that selects nobody": ("cpu", "Service/tensorboard", "spec.selector", {"app": "tensorboard"}, SAME, "selects no pod: app=tensorboard"),
    "a Service without a selector": ("cpu", "Service/tensorboard", "spec.selector", DELETED, SAME, "it is empty"),
    "a Service to a port that is not there": ("cpu", "Service/tensorboard", "spec.ports[0].targetPort", "web", SAME, "no pod has a port web"),
    "a Deployment that does not know its pods": ("cpu", TENSORBOARD, "spec.selector.matchLabels", {"app": "tensorboard"}, SAME, "not those of its own"),
    "a fence around nobody": ("cpu", "NetworkPolicy/training", "spec.podSelector.matchLabels", {"app": "job"}, "spec.podSelector", "selects no pod: app=job"),
    "no fence": ("indexed-job", "NetworkPolicy/training", "", DELETED, "spec.template.metadata.labels", "can run code there"),
    "a fence with a gate for all": ("indexed-job", "NetworkPolicy/training", "spec.ingress[0].from[0]", {"namespaceSelector": {}}, "spec.ingress[0].from", "lets others"),
    "a pod in another namespace": ("cpu", JOB, "metadata.namespace", "default", SAME, "not training"),
    # The MPIJob that goes on with fewer workers.
    "an elastic job that waits for all workers": ("elastic", JOB, "spec.launcherCreationPolicy", "WaitForWorkersReady", SAME, "must be AtStartup with --min-np"),
    "an elastic gang of all workers": ("elastic", JOB, "spec.runPolicy.schedulingPolicy.minAvailable", 3, SAME, "must be 2, the launcher and the workers for --min-np"),
    "a gang of more than there are pods": ("elastic", JOB, "spec.runPolicy.schedulingPolicy.minAvailable", 4, "spec", "there are 3 pods with the launcher"),
    "more workers than there may be ranks": ("elastic", JOB, "spec.mpiReplicaSpecs.Worker.replicas", 9, SAME, "the pods have 9 ranks, which is not from --min-np 1 to --max-np 8"),
    "fewer workers than the job needs": ("elastic", JOB, f"{LAUNCHER}.command[2]", "3", "spec.mpiReplicaSpecs.Worker.replicas", "not from --min-np 3"),
    "a batch too small for all that may come": ("elastic", JOB, f"{LAUNCHER}.args[4]", "data.global_batch=7", f"{LAUNCHER}.args", "7 is too small for 8 ranks"),
    # The Indexed Job.
    "fewer pods at once than there are": ("indexed-job", INDEXED, "spec.parallelism", 1, "spec.completions", "are 2, 1 and 2"),
    "other pods than ranks are told": ("indexed-job", INDEXED, f"{TRAINER}.env[0].value", "3", "spec.completions", "are 2, 2 and 3"),
    "a number of pods in words": ("indexed-job", INDEXED, f"{TRAINER}.env[0].value", "two", "spec.completions", "are 2, 2 and 0"),
    "a coordinator that nobody is": ("indexed-job", INDEXED, f"{TRAINER}.env[2].value", "fashion-mnist", "JOB_COORDINATOR", "pod 0 is called fashion-mnist-0.fashion-mnist"),
    "a rendezvous at another port": ("indexed-job", INDEXED, f"{TRAINER}.env[3].value", "29401", "JOB_COORDINATOR_PORT", "no port of the container"),
    "pods that nobody names": ("indexed-job", "Service/fashion-mnist", "", DELETED, f"{INDEXED_POD}.subdomain", "no Service fashion-mnist"),
    "names only for pods that are ready": ("indexed-job", "Service/fashion-mnist", "spec.publishNotReadyAddresses", DELETED, SAME, "must be True"),
    "a preemption that fails the job": ("indexed-job", INDEXED, "spec.podFailurePolicy.rules[1]", DELETED, "spec.podFailurePolicy.rules", "exit code 75 must Ignore, not Count"),
    "a failure that is repeated": ("indexed-job", INDEXED, "spec.podFailurePolicy.rules[2].onExitCodes.values", [2], "spec.podFailurePolicy.rules", "exit code 1 must FailJob"),
    "a drained node that fails the job": ("indexed-job", INDEXED, "spec.podFailurePolicy.rules[0]", DELETED, "spec.podFailurePolicy.rules", "DisruptionTarget"),
    "an elastic Indexed Job that ends when all pods do": ("indexed-job-elastic", INDEXED, "spec.successPolicy", DELETED, SAME, 'succeededIndexes: "0"'),
    "one that a pod can end by being killed": ("indexed-job-elastic", INDEXED, "spec.backoffLimitPerIndex", DELETED, SAME, "the others could go on"),
    "one without the keys": ("indexed-job-elastic", INDEXED, f"{TRAINER}.volumeMounts[0].mountPath", "/home/mpiuser/ssh", f"{TRAINER}.volumeMounts", "no Secret at /home/mpiuser/.ssh"),
    "one with another port for sshd": ("indexed-job-elastic", INDEXED, f"{TRAINER}.ports[0].containerPort", 22, f"{TRAINER}.ports", "sshd_config has port 2222, the container 22"),
    "one that needs more ranks than it has": ("indexed-job-elastic", INDEXED, f"{TRAINER}.command[4]", "3", "spec.parallelism", "not from --min-np 3"),
    "containers that restart in place": ("indexed-job", INDEXED, f"{INDEXED_POD}.restartPolicy", "OnFailure", SAME, "must be Never"),
}  # fmt: skip


@pytest.fixture
def schemas_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A document that is not changed is held against its schema once, for all rows."""
    by_schema = validate._by_schema

    def once(document: Any, *others: str) -> list[manifest.Problem]:
        key = json.dumps([document, others], sort_keys=True)
        if key not in SEEN:
            SEEN[key] = list(by_schema(document, *others))
        return SEEN[key]

    monkeypatch.setattr(validate, "_by_schema", once)


SEEN: dict[str, list[manifest.Problem]] = {}


@needs_kubectl
@pytest.mark.usefixtures("schemas_once")
@pytest.mark.parametrize("row", BROKEN.values(), ids=BROKEN.keys())
def test_what_is_broken_is_told_with_its_place(row: tuple[Any, ...]) -> None:
    overlay, document, path, value, place, words = row
    found = validate.problems(edited(overlay, document, path, value), VERSION)
    assert any((place or path) in problem.path and words in problem.message for problem in found), list(map(str, found))


def paths(part: Any, path: str = "") -> Iterator[str]:
    for key, value in part.items() if isinstance(part, dict) else enumerate(part):
        where = f"{path}[{key}]" if isinstance(part, list) else f"{path}.{key}".lstrip(".")
        if "/" not in where:  # the path of a label cannot be told from others
            yield where
            if isinstance(value, (dict, list)):
                yield from paths(value, where)


@needs_kubectl
@pytest.mark.slow
@pytest.mark.usefixtures("schemas_once")
@pytest.mark.parametrize("overlay", ["gpu-2x4", "indexed-job"])
def test_whatever_is_missing_the_answer_is_never_a_traceback(overlay: str) -> None:
    for document in rendered(overlay):
        for path in paths(document):
            if path not in ("apiVersion", "kind", "metadata", "metadata.name"):  # those `read` asks for
                validate.problems(edited(overlay, manifest.name(document), path, DELETED), VERSION)


# --- the command -----------------------------------------------------------------------------------------------------


def run(*arguments: object) -> tuple[int, str, str]:
    command = [sys.executable, KUBERNETES / "validate.py", *arguments]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120, cwd="/")
    return done.returncode, done.stdout, done.stderr


@needs_kubectl
def test_the_command_validates_folders_from_anywhere_and_names_what_is_wrong(tmp_path: Path) -> None:
    code, out, err = run(KUBERNETES / "once", KUBERNETES / "overlays" / "cpu")
    assert (code, err) == (0, "") and "9 documents, nothing wrong" in out
    file = tmp_path / "broken.yaml"
    file.write_text(yaml.safe_dump_all(edited("cpu", JOB, "spec.slots", 1)))
    assert run(file) == (1, "", f"error: {JOB}: spec.slots: unknown key\n")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "cannot be read"),
        ("a: [", "not valid YAML"),
        ("", "holds no document"),
        ("kind: Pod\n", "document 1 has not apiVersion, kind and metadata.name"),
    ],
    ids=["missing", "no YAML", "empty", "no object"],
)
def test_a_file_that_is_no_manifest_is_a_usage_error(tmp_path: Path, text: str | None, words: str) -> None:
    file = tmp_path / "file.yaml"
    if text is not None:
        file.write_text(text)
    code, out, err = run(file)
    assert (code, out) == (2, "") and words in err and "Traceback" not in err


def test_a_fence_alone_is_told_that_it_fences_nobody(tmp_path: Path) -> None:
    file = tmp_path / "deny.yaml"
    policy = {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {"name": "deny"}}
    file.write_text(yaml.safe_dump({**policy, "spec": {"podSelector": {}, "policyTypes": ["Ingress"]}}))
    code, out, err = run(file)
    assert (code, out) == (1, "") and "spec.podSelector: selects no pod: it is empty" in err
