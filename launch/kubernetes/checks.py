"""What no schema sees: that the parts of the manifests fit each other, the image, and the job that they start.

Each check takes all documents that are applied together, each valid by itself, and yields what does not fit.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Optional

from job.config import Config, load_config
from job.errors import UsageError

ROOT = Path(__file__).resolve().parents[2]
IN_IMAGE = "/opt/job/"  # where the image has this repository
SSHD, SSHD_CONFIG = "/usr/sbin/sshd", "/home/mpiuser/.sshd_config"
PROGRAMS = {SSHD, "bash", "python", "tensorboard", "tini"}  # of the image, beside the files of this repository
UID = 1000
IMAGE = re.compile(r"(?:[\w.:-]+/)*horovod-gluon-job:(cpu|gpu)(?:-[\w.-]+)?")
GPU = "nvidia.com/gpu"
_QUANTITY = re.compile(r"(\d+(?:\.\d*)?(?:e\d+)?)(m|[kMGTPE]|[KMGTPE]i|)")
CHECKPOINT_SECONDS = 60  # what a pod that is put out must have at least, for a step and its checkpoint
PREEMPTED, FAILED, BAD_CONFIGURATION = 75, 1, 2

Document = Mapping[str, Any]


class Problem(NamedTuple):
    """What is wrong, and where."""

    document: str
    path: str
    message: str

    def __str__(self) -> str:
        return f"{self.document}: {self.path}: {self.message}"


@dataclass(frozen=True)
class Pods:
    """A template, and the pods that are made from it."""

    document: str
    path: str
    count: int
    labels: Mapping[str, str]
    spec: Mapping[str, Any]
    mounted: Sequence[str] = ()  # what the operator mounts into the first container

    @property
    def containers(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Each with its path."""
        for index, container in enumerate(self.spec["containers"]):
            yield f"{self.path}.spec.containers[{index}]", container

    @property
    def gpus(self) -> int:
        """Of one pod."""
        return sum(int(quantity(_limits(container).get(GPU, 0))) for _, container in self.containers)

    @property
    def trains(self) -> bool:
        """Whether ranks run in it."""
        return any({SSHD, f"{IN_IMAGE}launch/rank.py"} & set(_words(container)) for _, container in self.containers)

    def volume(self, mount: Mapping[str, Any]) -> Mapping[str, Any]:
        """What is mounted; empty if there is no such volume."""
        return next((volume for volume in self.spec.get("volumes", ()) if volume["name"] == mount["name"]), {})


def name(document: Document) -> str:
    """By which people call it: ``Service/tensorboard``."""
    return f"{document['kind']}/{document['metadata']['name']}"


def all_pods(documents: Sequence[Document]) -> Iterator[Pods]:
    """Every template in ``documents``."""
    for document in documents:
        spec = document.get("spec", {})
        if document["kind"] == "MPIJob":
            for role, replica in spec["mpiReplicaSpecs"].items():
                path = f"spec.mpiReplicaSpecs.{role}.template"
                mounted = (spec.get("sshAuthMountPath", "/root/.ssh"), *(["/etc/mpi"] if role == "Launcher" else []))
                yield _pods(document, path, replica["template"], replica.get("replicas", 1), mounted)
        elif document["kind"] in ("Deployment", "Job"):
            count = spec.get("parallelism", spec.get("replicas", 1))
            yield _pods(document, "spec.template", spec["template"], count)


def _pods(document: Document, path: str, template: Document, count: int, mounted: Sequence[str] = ()) -> Pods:
    labels = template.get("metadata", {}).get("labels", {})
    return Pods(name(document), path, count, labels, template["spec"], mounted)


def _words(container: Mapping[str, Any]) -> list[str]:
    return [*container.get("command", ()), *container.get("args", ())]


def _limits(container: Mapping[str, Any]) -> Mapping[str, Any]:
    limits: Mapping[str, Any] = container.get("resources", {}).get("limits", {})
    return limits


def is_quantity(text: object) -> bool:
    """Whether :func:`quantity` can read it."""
    return _QUANTITY.fullmatch(str(text)) is not None


def quantity(text: object) -> float:
    """Kubernetes' way of writing numbers: ``500m``, ``2``, ``3Gi``."""
    match = _QUANTITY.fullmatch(str(text))
    if not match:
        raise ValueError(f"{text!r} is no quantity")
    suffix = match[2]
    base = 1024 if suffix.endswith("i") else 1000
    return float(match[1]) * (0.001 if suffix == "m" else base ** " kMGTPE".index(suffix[:1].replace("K", "k") or " "))


# --- each document among the others ----------------------------------------------------------------------------------


def names(documents: Sequence[Document]) -> Iterator[Problem]:
    """No two of one name, and all in one namespace."""
    for called, times in Counter(map(name, documents)).items():
        if times > 1:
            yield Problem(called, "metadata.name", f"given {times} times; the last would replace the others")
    spaces = Counter(
        d["metadata"].get("namespace") for d in documents if d["kind"] not in ("Namespace", "PriorityClass")
    )
    usual = spaces.most_common(1)[0][0] if spaces else None
    for document in documents:
        if document["kind"] == "Namespace" and spaces and usual != document["metadata"]["name"]:
            yield Problem(name(document), "metadata.name", f"the others are in namespace {usual}")
        elif document["kind"] not in ("Namespace", "PriorityClass") and document["metadata"].get("namespace") != usual:
            yield Problem(name(document), "metadata.namespace", f"not {usual}, where most are: they would not meet")


def references(documents: Sequence[Document]) -> Iterator[Problem]:
    """Service accounts, priority classes and claims that pods name are there."""
    there = {name(document): document for document in documents}
    for pods in all_pods(documents):
        account = there.get(f"ServiceAccount/{pods.spec.get('serviceAccountName')}")
        where = f"{pods.path}.spec"
        if not account:
            yield Problem(
                pods.document, f"{where}.serviceAccountName", "names no ServiceAccount that is applied with it"
            )
        for path, holder in ((where, pods.spec), ("the ServiceAccount", account or {})):
            if account and holder.get("automountServiceAccountToken") is not False:
                message = "must be false: the job has no business with Kubernetes"
                yield Problem(pods.document, f"{path}.automountServiceAccountToken", message)
        priority = pods.spec.get("priorityClassName")
        if priority and not priority.startswith("system-") and f"PriorityClass/{priority}" not in there:
            yield Problem(pods.document, f"{where}.priorityClassName", f"there is no PriorityClass {priority}")
        for index, volume in enumerate(pods.spec.get("volumes", ())):
            claim = volume.get("persistentVolumeClaim", {}).get("claimName")
            if claim and f"PersistentVolumeClaim/{claim}" not in there:
                path = f"{where}.volumes[{index}].persistentVolumeClaim.claimName"
                yield Problem(pods.document, path, f"there is no PersistentVolumeClaim {claim}")


def shared_claims(documents: Sequence[Document]) -> Iterator[Problem]:
    """A claim that several pods mount can be mounted by many."""
    users: Counter[str] = Counter()
    for pods in all_pods(documents):
        for volume in pods.spec.get("volumes", ()):
            users[volume.get("persistentVolumeClaim", {}).get("claimName", "")] += pods.count
    for document in documents:
        pods_of_it = users[document["metadata"]["name"]] if document["kind"] == "PersistentVolumeClaim" else 0
        if pods_of_it > 1 and "ReadWriteMany" not in document.get("spec", {}).get("accessModes", ()):
            message = f"{pods_of_it} pods mount it, on any nodes, so it must be ReadWriteMany"
            yield Problem(name(document), "spec.accessModes", message)


def selectors(documents: Sequence[Document]) -> Iterator[Problem]:
    """Services, Deployments and NetworkPolicies select pods that there are; Services, ports that those have."""
    everyone = list(all_pods(documents))
    for document in documents:
        spec, kind = document.get("spec", {}), document["kind"]
        if kind == "Service":
            selector = spec.get("selector", {})
            chosen = [pods for pods in everyone if selector and _selects(selector, pods)]
            if not chosen:
                yield Problem(name(document), "spec.selector", f"selects no pod: {_listed(selector) or 'it is empty'}")
            for index, port in enumerate(spec.get("ports", ())):
                wanted = port.get("targetPort", port["port"])
                if chosen and not any(_has_port(pods, wanted) for pods in chosen):
                    yield Problem(name(document), f"spec.ports[{index}].targetPort", f"no pod has a port {wanted}")
        elif kind == "Deployment":
            own = next(pods for pods in everyone if pods.document == name(document))
            if not _selects(spec["selector"].get("matchLabels", {}), own):
                yield Problem(name(document), "spec.selector.matchLabels", "are not those of its own template")
        elif kind == "NetworkPolicy":
            for path, selector in _own_selectors(spec):
                if not any(_selects(selector.get("matchLabels", {}), pods) for pods in everyone):
                    yield Problem(name(document), path, f"selects no pod: {_listed(selector['matchLabels'])}")


def fences(documents: Sequence[Document]) -> Iterator[Problem]:
    """Nobody but the job's own pods reaches a pod that trains, for its rendezvous server unpickles what it is sent."""
    policies = [document for document in documents if document["kind"] == "NetworkPolicy"]
    for pods in all_pods(documents):
        if not _is_of_job(pods):
            continue
        own = [p for p in policies if _selects(p["spec"]["podSelector"].get("matchLabels", {}), pods)]
        if not any("Ingress" in policy["spec"].get("policyTypes", ()) for policy in own):
            message = "no NetworkPolicy for Ingress selects these pods: whoever reaches their ports can run code there"
            yield Problem(pods.document, f"{pods.path}.metadata.labels", message)
        for policy in own:
            for index, rule in enumerate(policy["spec"].get("ingress", ())):
                peers = rule.get("from", ())
                if not peers or any(set(peer) != {"podSelector"} or not peer["podSelector"] for peer in peers):
                    message = f"lets others than the job's pods reach {pods.document}"
                    yield Problem(name(policy), f"spec.ingress[{index}].from", message)


def _is_of_job(pods: Pods) -> bool:
    return pods.trains or pods.document.startswith("MPIJob/")


def _selects(selector: Mapping[str, str], pods: Pods) -> bool:
    return selector.items() <= pods.labels.items()


def _has_port(pods: Pods, wanted: object) -> bool:
    return any(wanted in _ports(container) for _, container in pods.containers)


def _ports(container: Mapping[str, Any]) -> dict[object, int]:
    """Port numbers, by number and by name."""
    ports = container.get("ports", ())
    return {key: port["containerPort"] for port in ports for key in (port.get("name"), port["containerPort"]) if key}


def _own_selectors(spec: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Those of a NetworkPolicy that are about pods of its own namespace."""
    yield "spec.podSelector", spec["podSelector"]
    for direction, side in (("ingress", "from"), ("egress", "to")):
        for index, rule in enumerate(spec.get(direction, ())):
            for position, peer in enumerate(rule.get(side, ())):
                if "podSelector" in peer and "namespaceSelector" not in peer:
                    yield f"spec.{direction}[{index}].{side}[{position}].podSelector", peer["podSelector"]


def _listed(labels: Mapping[str, str]) -> str:
    return ", ".join(f"{key}={value}" for key, value in labels.items())


# --- each pod --------------------------------------------------------------------------------------------------------


def mounts(documents: Sequence[Document]) -> Iterator[Problem]:
    """Every mount has its volume, every volume is mounted, and nothing is mounted over."""
    for pods in all_pods(documents):
        volumes = [volume["name"] for volume in pods.spec.get("volumes", ())]
        unused = set(volumes)
        for number, (path, container) in enumerate(pods.containers):
            taken = set(pods.mounted) if number == 0 else set()
            for index, mount in enumerate(container.get("volumeMounts", ())):
                where = f"{path}.volumeMounts[{index}]"
                unused.discard(mount["name"])
                if mount["name"] not in volumes:
                    message = f"there is no volume {mount['name']!r}; there are {', '.join(volumes) or 'none'}"
                    yield Problem(pods.document, f"{where}.name", message)
                if mount["mountPath"] in taken:
                    yield Problem(pods.document, f"{where}.mountPath", f"{mount['mountPath']} is mounted already")
                taken.add(mount["mountPath"])
        for index, volume in enumerate(volumes):
            if volume in unused:
                yield Problem(pods.document, f"{pods.path}.spec.volumes[{index}]", f"{volume!r} is mounted nowhere")


def security(documents: Sequence[Document]) -> Iterator[Problem]:
    """What the pod security standard ``restricted`` asks for, as the image's user."""
    for pods in all_pods(documents):
        own = pods.spec.get("securityContext", {})
        where = f"{pods.path}.spec"
        wanted = {"runAsNonRoot": True, "runAsUser": UID, "fsGroup": UID, "seccompProfile": {"type": "RuntimeDefault"}}
        yield from _demand(pods.document, f"{where}.securityContext", own, wanted)
        for key in ("hostNetwork", "hostPID", "hostIPC"):
            if pods.spec.get(key):
                yield Problem(pods.document, f"{where}.{key}", "is forbidden by pod security `restricted`")
        for index, volume in enumerate(pods.spec.get("volumes", ())):
            if "hostPath" in volume:
                message = "is forbidden by pod security `restricted`"
                yield Problem(pods.document, f"{where}.volumes[{index}].hostPath", message)
        for path, container in pods.containers:
            context = container.get("securityContext", {})
            wanted = {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            yield from _demand(pods.document, f"{path}.securityContext", context, wanted)
            for key in ("privileged", "runAsUser", "runAsNonRoot"):
                if key in context:
                    yield Problem(pods.document, f"{path}.securityContext.{key}", "is for the pod to say")


def _demand(document: str, path: str, own: Mapping[str, Any], wanted: Mapping[str, Any]) -> Iterator[Problem]:
    for key, value in wanted.items():
        if own.get(key) != value:
            yield Problem(document, f"{path}.{key}", f"must be {value}, is {own.get(key, 'not given')}")


def resources(documents: Sequence[Document]) -> Iterator[Problem]:
    """Requests and limits are given and fit each other; memory-backed volumes have a limit within the container's."""
    for pods in all_pods(documents):
        for path, container in pods.containers:
            limits, requests = _limits(container), container.get("resources", {}).get("requests", {})
            for kind in ("cpu", "memory"):
                if kind not in limits or kind not in requests:
                    yield Problem(pods.document, f"{path}.resources", f"{kind} needs a request and a limit")
                elif quantity(requests[kind]) > quantity(limits[kind]):
                    yield Problem(pods.document, f"{path}.resources.requests.{kind}", "is more than its limit")
            if GPU in requests and requests[GPU] != limits.get(GPU):
                yield Problem(pods.document, f"{path}.resources.requests", f"{GPU} must equal its limit")
            for index, mount in enumerate(container.get("volumeMounts", ())):
                memory = pods.volume(mount).get("emptyDir", {})
                where = f"{path}.volumeMounts[{index}]"
                if mount["mountPath"] == "/dev/shm" and memory.get("medium") != "Memory":
                    yield Problem(pods.document, where, "/dev/shm must be an emptyDir with medium: Memory")
                elif memory.get("medium") == "Memory" and not _fits(memory.get("sizeLimit"), limits.get("memory")):
                    message = "a volume in memory needs a sizeLimit below the container's memory, of which it is part"
                    yield Problem(pods.document, where, message)
        if pods.trains and "/dev/shm" not in {
            m["mountPath"] for _, c in pods.containers for m in c.get("volumeMounts", ())
        }:
            yield Problem(pods.document, f"{pods.path}.spec.volumes", "ranks need a /dev/shm of more than 64 MiB")


def _fits(part: object, whole: object) -> bool:
    return part is not None and whole is not None and quantity(part) < quantity(whole)


def probes(documents: Sequence[Document]) -> Iterator[Problem]:
    """Probes ask ports that the container has, and whoever serves something has one."""
    for pods in all_pods(documents):
        for path, container in pods.containers:
            for kind in ("readinessProbe", "livenessProbe", "startupProbe"):
                for how in ("tcpSocket", "httpGet"):
                    port = container.get(kind, {}).get(how, {}).get("port")
                    if port is not None and port not in _ports(container):
                        yield Problem(pods.document, f"{path}.{kind}.{how}.port", f"the container has no port {port}")
            if SSHD in _words(container) and "readinessProbe" not in container:
                message = "sshd needs one: the launcher is made when all workers are ready"
                yield Problem(pods.document, f"{path}.readinessProbe", message)


def image(documents: Sequence[Document]) -> Iterator[Problem]:
    """The image is one that the Dockerfile builds, and has the commands and files that are named."""
    dockerfile = ROOT / "Dockerfile"
    targets = (
        set(re.findall(r"(?m)^FROM .* AS (\w+)", dockerfile.read_text())) if dockerfile.exists() else {"cpu", "gpu"}
    )
    for pods in all_pods(documents):
        for path, container in pods.containers:
            match = IMAGE.fullmatch(container.get("image", ""))
            if not match or match[1] not in targets:
                message = (
                    f"{container.get('image')!r} is none of horovod-gluon-job:cpu and :gpu, which the Dockerfile builds"
                )
                yield Problem(pods.document, f"{path}.image", message)
            elif (match[1] == "gpu") != bool(_limits(container).get(GPU)):
                message = f"the image for GPUs and the limit {GPU} belong together"
                yield Problem(pods.document, f"{path}.image", message)
            hook = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", [])
            for field, words in (("command", container.get("command", [])), ("lifecycle.preStop.exec.command", hook)):
                yield from _missing_files(pods.document, f"{path}.{field}", words)
            yield from _missing_files(pods.document, f"{path}.args", ["python", *container.get("args", [])])


def _missing_files(document: str, path: str, words: Sequence[str]) -> Iterator[Problem]:
    for index, word in enumerate(words):
        file = word.partition("=")[2] or word  # --config=FILE
        if file.startswith(IN_IMAGE):
            found = ROOT / file[len(IN_IMAGE) :]
            if not found.is_file():
                yield Problem(document, path, f"{file} is not in the image: there is no {found}")
            elif index == 0 and not found.stat().st_mode & 0o100:
                yield Problem(document, path, f"{file} is not executable")
        elif index == 0 and word not in PROGRAMS:
            yield Problem(document, path, f"{word!r} is no command of the image")


# --- each job --------------------------------------------------------------------------------------------------------


def ssh(documents: Sequence[Document]) -> Iterator[Problem]:
    """The pods of an MPIJob agree with launch/kubernetes/sshd_config, and end their ranks before they go."""
    config = dict(re.findall(r"(?m)^(\w+) +(.*)$", (ROOT / "launch/kubernetes/sshd_config").read_text()))
    for document in documents:
        if document["kind"] != "MPIJob":
            continue
        keys = str(Path(config["HostKey"]).parent)
        mounted = document["spec"].get("sshAuthMountPath", "/root/.ssh")
        if mounted != keys:
            yield Problem(
                name(document), "spec.sshAuthMountPath", f"is {mounted}, but sshd_config has its keys in {keys}"
            )
        for pods in all_pods([document]):
            for path, container in pods.containers:
                if SSHD not in _words(container):
                    continue
                if _words(container) != [SSHD, "-De", "-f", SSHD_CONFIG]:
                    message = f"sshd is to run as {SSHD} -De -f {SSHD_CONFIG}, in the foreground and as uid {UID}"
                    yield Problem(name(document), f"{path}.command", message)
                if int(config["Port"]) not in _ports(container):
                    message = f"sshd_config has port {config['Port']}, the container {_listed_ports(container)}"
                    yield Problem(name(document), f"{path}.ports", message)
                if "preStop" not in container.get("lifecycle", {}):
                    message = "without it SIGTERM reaches sshd alone, and the ranks are killed without a checkpoint"
                    yield Problem(name(document), f"{path}.lifecycle.preStop", message)


def _listed_ports(container: Mapping[str, Any]) -> str:
    return ", ".join(sorted({str(port) for port in _ports(container).values()})) or "none"


def grace(documents: Sequence[Document]) -> Iterator[Problem]:
    """Pods of the job get the time for a step and its checkpoint."""
    for pods in all_pods(documents):
        seconds = pods.spec.get("terminationGracePeriodSeconds", 30)
        if _is_of_job(pods) and seconds < CHECKPOINT_SECONDS:
            message = f"{seconds} s are too short for a step and its checkpoint; give {CHECKPOINT_SECONDS} or more"
            yield Problem(pods.document, f"{pods.path}.spec.terminationGracePeriodSeconds", message)


def slots(documents: Sequence[Document]) -> Iterator[Problem]:
    """One rank a GPU, and a core for each rank."""
    for document in documents:
        per_pod = _ranks_per_pod(document)
        for pods in all_pods([document]) if per_pod else ():
            if not pods.trains:
                continue
            path = "spec.slotsPerWorker" if document["kind"] == "MPIJob" else f"{pods.path}: JOB_RANKS_PER_HOST"
            if pods.gpus and pods.gpus != per_pod:
                yield Problem(name(document), path, f"{per_pod} ranks a pod, but its limit {GPU} is {pods.gpus}")
            cores = sum(quantity(_limits(container).get("cpu", 0)) for _, container in pods.containers)
            if cores < per_pod:
                yield Problem(
                    name(document), path, f"{per_pod} ranks a pod share {cores:g} cores; give each one at least"
                )


def indexed_job(documents: Sequence[Document]) -> Iterator[Problem]:
    """The variables of an Indexed Job describe it, its pods find each other, and 75 alone is forgiven."""
    for document in documents:
        if document["kind"] != "Job":
            continue
        spec, variables = document["spec"], _variables(document)
        own = next(all_pods([document]))
        where = f"{own.path}.spec"
        counts = (spec.get("completions"), spec.get("parallelism"), _number(variables.get("JOB_HOSTS")))
        if len(set(counts)) != 1 or spec.get("completionMode") != "Indexed":
            message = (
                "completions, parallelism and JOB_HOSTS are %s, %s and %s; all pods run at once, each with an index"
            )
            yield Problem(name(document), "spec.completions", message % counts)
        subdomain = own.spec.get("subdomain")
        coordinator = f"{document['metadata']['name']}-0.{subdomain}"
        if variables.get("JOB_COORDINATOR") != coordinator:
            message = f"is {variables.get('JOB_COORDINATOR')}, but pod 0 is called {coordinator}"
            yield Problem(name(document), f"{where}: JOB_COORDINATOR", message)
        if _number(variables.get("JOB_COORDINATOR_PORT")) not in _ports(own.spec["containers"][0]):
            yield Problem(name(document), f"{where}: JOB_COORDINATOR_PORT", "is no port of the container")
        yield from _named_by_service(documents, document, own, subdomain)
        yield from _forgives(document)


def _named_by_service(
    documents: Sequence[Document], document: Document, own: Pods, subdomain: Optional[str]
) -> Iterator[Problem]:
    service = next((d for d in documents if name(d) == f"Service/{subdomain}"), None)
    if not service:
        yield Problem(name(document), f"{own.path}.spec.subdomain", f"there is no Service {subdomain} to name the pods")
        return
    wanted = {"clusterIP": "None", "publishNotReadyAddresses": True}
    yield from _demand(name(service), "spec", service["spec"], wanted)
    if not _selects(service["spec"].get("selector", {}), own):
        yield Problem(name(service), "spec.selector", f"does not select the pods of {name(document)}")


def _forgives(document: Document) -> Iterator[Problem]:
    spec = document["spec"]
    rules = spec.get("podFailurePolicy", {}).get("rules", ())
    if spec["template"]["spec"].get("restartPolicy") != "Never":
        yield Problem(name(document), "spec.template.spec.restartPolicy", "must be Never for a podFailurePolicy")
    for code, action in ((PREEMPTED, "Ignore"), (FAILED, "FailJob"), (BAD_CONFIGURATION, "FailJob")):
        decided = next((rule["action"] for rule in rules if code in _codes(rule)), "Count")
        if decided != action:
            message = f"exit code {code} must {action}, not {decided}: only a job that was preempted goes on"
            yield Problem(name(document), "spec.podFailurePolicy.rules", message)
    if not any("DisruptionTarget" in str(rule.get("onPodConditions")) for rule in rules if rule["action"] == "Ignore"):
        message = "nothing ignores DisruptionTarget: a pod that is put out would fail the job"
        yield Problem(name(document), "spec.podFailurePolicy.rules", message)


def _codes(rule: Mapping[str, Any]) -> Sequence[int]:
    codes = rule.get("onExitCodes", {})
    values: Sequence[int] = codes.get("values", ()) if codes.get("operator") == "In" else ()
    return values


def training(documents: Sequence[Document]) -> Iterator[Problem]:
    """train.py accepts its arguments, resumes, writes onto a claim, and has samples for all ranks."""
    for document in documents:
        ranks = _ranks_per_pod(document) * sum(pods.count for pods in all_pods([document]) if pods.trains)
        for pods in all_pods([document]) if ranks else ():
            for path, container in pods.containers:
                arguments = _train_arguments(_words(container))
                if arguments is None:
                    continue
                try:
                    config = _load(arguments)
                except UsageError as error:
                    yield Problem(name(document), f"{path}.args", " ".join(str(error).split()))
                    continue
                for message in _unfit(config, document, ranks):
                    yield Problem(name(document), f"{path}.args", message)


def _train_arguments(words: Sequence[str]) -> Optional[Sequence[str]]:
    """Those of train.py; None where the command does not start it."""
    for index, word in enumerate(words):
        if word in (f"{IN_IMAGE}launch/kubernetes/launcher.sh", f"{IN_IMAGE}launch/cluster.sh"):
            return words[index + 2 :] if words[index + 1 : index + 2] == ["/etc/mpi/hostfile"] else words[index + 1 :]
        if word == f"{IN_IMAGE}launch/rank.py":
            return words[index + 1 :]
    return None


def _load(arguments: Sequence[str]) -> Config:
    file, overrides, rest = None, [], list(arguments)
    while rest:
        word = rest.pop(0)
        if word == "--config" and rest:
            word = f"--config={rest.pop(0)}"
        if word.startswith("--config="):
            path = word.partition("=")[2]
            file = ROOT / path[len(IN_IMAGE) :] if path.startswith(IN_IMAGE) else Path(path)
        else:
            overrides.append(word)
    return load_config(file, overrides)


def _unfit(config: Config, document: Document, ranks: int) -> Iterator[str]:
    if config.run.resume != "auto":
        yield f"run.resume is {config.run.resume}; a pod that comes back would not go on: give run.resume=auto"
    if config.data.global_batch_of(ranks) < ranks * config.train.accumulate_steps:
        yield f"a global batch of {config.data.global_batch_of(ranks)} is too small for {ranks} ranks"
    for pods in all_pods([document]):
        if not pods.trains:
            continue
        claims = [
            mount["mountPath"]
            for _, container in pods.containers
            for mount in container.get("volumeMounts", ())
            if "persistentVolumeClaim" in pods.volume(mount) and not mount.get("readOnly")
        ]
        if not any(Path(claim) in config.run.dir.parents for claim in claims):
            yield f"run.dir={config.run.dir} is on no claim of the ranks' pods ({', '.join(claims) or 'there is none'})"
        if config.run.device != ("gpu" if pods.gpus else "cpu"):
            yield f"run.device={config.run.device}, but the ranks' pods have {pods.gpus or 'no'} GPUs"


def _ranks_per_pod(document: Document) -> int:
    """0 for a document that trains nothing."""
    if document["kind"] == "MPIJob":
        return int(document["spec"].get("slotsPerWorker", 1))
    return _number(_variables(document).get("JOB_RANKS_PER_HOST", "1")) if document["kind"] == "Job" else 0


def _number(text: Optional[str]) -> int:
    """0 for what is none."""
    return int(text) if text and text.isdigit() else 0


def _variables(document: Document) -> dict[str, str]:
    container = document["spec"]["template"]["spec"]["containers"][0]
    return {variable["name"]: variable.get("value", "") for variable in container.get("env", ())}


CHECKS: Sequence[Callable[[Sequence[Document]], Iterator[Problem]]] = (
    names, references, shared_claims, selectors, fences, mounts, security, resources, probes, image, ssh, grace, slots,
    indexed_job, training,
)  # fmt: skip
