"""Imported by validate.py: what no schema sees of any workload. Do the objects find one another, can the pods run?

Each check takes all documents that are applied together, each valid by itself, and yields what does not fit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from launch.kubernetes.checks.manifest import (
    GPU,
    SSHD,
    UID,
    Document,
    Pods,
    Problem,
    all_pods,
    command_line,
    demand,
    limits_of,
    name,
    ports_of,
    quantity,
)

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
            chosen = [pods for pods in everyone if selector and pods.has_labels(selector)]
            if not chosen:
                yield Problem(name(document), "spec.selector", f"selects no pod: {_listed(selector)}")
            for index, port in enumerate(spec.get("ports", ())):
                wanted = port.get("targetPort", port["port"])
                if chosen and not any(_has_port(pods, wanted) for pods in chosen):
                    yield Problem(name(document), f"spec.ports[{index}].targetPort", f"no pod has a port {wanted}")
        elif kind == "Deployment":
            own = next(pods for pods in everyone if pods.document == name(document))
            if not own.has_labels(spec["selector"].get("matchLabels", {})):
                yield Problem(name(document), "spec.selector.matchLabels", "are not those of its own template")
        elif kind == "NetworkPolicy":
            for path, selector in _own_selectors(spec):
                if not any(pods.has_labels(selector.get("matchLabels", {})) for pods in everyone):
                    yield Problem(name(document), path, f"selects no pod: {_listed(selector.get('matchLabels', {}))}")


def _has_port(pods: Pods, wanted: object) -> bool:
    return any(wanted in ports_of(container) for _, container in pods.containers)


def _own_selectors(spec: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Those of a NetworkPolicy that are about pods of its own namespace."""
    yield "spec.podSelector", spec["podSelector"]
    for direction, side in (("ingress", "from"), ("egress", "to")):
        for index, rule in enumerate(spec.get(direction, ())):
            for position, peer in enumerate(rule.get(side, ())):
                if "podSelector" in peer and "namespaceSelector" not in peer:
                    yield f"spec.{direction}[{index}].{side}[{position}].podSelector", peer["podSelector"]


def _listed(labels: Mapping[str, str]) -> str:
    return ", ".join(f"{key}={value}" for key, value in labels.items()) or "it is empty"


def fences(documents: Sequence[Document]) -> Iterator[Problem]:
    """Nobody but the job's own pods reaches a pod that trains, for its rendezvous server unpickles what it is sent."""
    policies = [document for document in documents if document["kind"] == "NetworkPolicy"]
    for pods in all_pods(documents):
        if not pods.of_job:
            continue
        own = [p for p in policies if pods.has_labels(p["spec"]["podSelector"].get("matchLabels", {}))]
        if not any("Ingress" in policy["spec"].get("policyTypes", ()) for policy in own):
            message = "no NetworkPolicy for Ingress selects these pods: whoever reaches their ports can run code there"
            yield Problem(pods.document, f"{pods.path}.metadata.labels", message)
        for policy in own:
            for index, rule in enumerate(policy["spec"].get("ingress", ())):
                peers = rule.get("from", ())
                if not peers or any(set(peer) != {"podSelector"} or not peer["podSelector"] for peer in peers):
                    message = f"lets others than the job's pods reach {pods.document}"
                    yield Problem(name(policy), f"spec.ingress[{index}].from", message)


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
        yield from demand(pods.document, f"{where}.securityContext", own, wanted)
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
            yield from demand(pods.document, f"{path}.securityContext", context, wanted)
            for key in ("privileged", "runAsUser", "runAsNonRoot"):
                if key in context:
                    yield Problem(pods.document, f"{path}.securityContext.{key}", "is for the pod to say")


def resources(documents: Sequence[Document]) -> Iterator[Problem]:
    """Requests and limits are given and fit each other; memory-backed volumes have a limit within the container's."""
    for pods in all_pods(documents):
        for path, container in pods.containers:
            limits, requests = limits_of(container), container.get("resources", {}).get("requests", {})
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
                    if port is not None and port not in ports_of(container):
                        yield Problem(pods.document, f"{path}.{kind}.{how}.port", f"the container has no port {port}")
            if SSHD in command_line(container) and "readinessProbe" not in container:
                message = "sshd needs one: the launcher is made when all workers are ready"
                yield Problem(pods.document, f"{path}.readinessProbe", message)


CHECKS = (names, references, shared_claims, selectors, fences, mounts, security, resources, probes)
