"""Imported by validate.py: how manifests are read. Their documents, their pods, and the problems found in both."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

IN_IMAGE = "/opt/job/"  # where the image has this repository
SSHD, SSHD_CONFIG = "/usr/sbin/sshd", "/home/mpiuser/.sshd_config"
UID = 1000
GPU = "nvidia.com/gpu"
RANK_SCRIPT = f"{IN_IMAGE}launch/rank.py"
INDEXED_SCRIPT = f"{IN_IMAGE}launch/kubernetes/indexed.sh"
_QUANTITY = re.compile(r"(\d+(?:\.\d*)?(?:e\d+)?)(m|[kMGTPE]|[KMGTPE]i|)")

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
        return sum(int(quantity(limits_of(container).get(GPU, 0))) for _, container in self.containers)

    @property
    def trains(self) -> bool:
        """Whether ranks run in it."""
        return any(
            {SSHD, RANK_SCRIPT, INDEXED_SCRIPT} & set(command_line(container)) for _, container in self.containers
        )

    @property
    def of_job(self) -> bool:
        """Whether it is one of the job's own, with ranks or to launch them."""
        return self.trains or self.document.startswith("MPIJob/")

    def has_labels(self, wanted: Mapping[str, str]) -> bool:
        """Whether a selector with these labels selects it."""
        return wanted.items() <= self.labels.items()

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


def command_line(container: Mapping[str, Any]) -> list[str]:
    """The words that it is started with."""
    return [*container.get("command", ()), *container.get("args", ())]


def limits_of(container: Mapping[str, Any]) -> Mapping[str, Any]:
    """Its resources' limits, by kind."""
    limits: Mapping[str, Any] = container.get("resources", {}).get("limits", {})
    return limits


def ports_of(container: Mapping[str, Any]) -> dict[object, int]:
    """Port numbers, by number and by name."""
    ports = container.get("ports", ())
    return {key: port["containerPort"] for port in ports for key in (port.get("name"), port["containerPort"]) if key}


def is_quantity(text: object) -> bool:
    """Whether :func:`quantity` can read it."""
    return _QUANTITY.fullmatch(str(text)) is not None


def quantity(text: object) -> float:
    """Kubernetes' way of writing numbers: ``500m``, ``2``, ``3Gi``.

    Raises:
        ValueError: it is none.
    """
    match = _QUANTITY.fullmatch(str(text))
    if not match:
        raise ValueError(f"{text!r} is no quantity")
    suffix = match[2]
    base = 1024 if suffix.endswith("i") else 1000
    return float(match[1]) * (0.001 if suffix == "m" else base ** " kMGTPE".index(suffix[:1].replace("K", "k") or " "))


def demand(document: str, path: str, own: Mapping[str, Any], wanted: Mapping[str, Any]) -> Iterator[Problem]:
    """Where ``own``, which is at ``path``, differs from ``wanted``."""
    for key, value in wanted.items():
        if own.get(key) != value:
            yield Problem(document, f"{path}.{key}", f"must be {value}, is {own.get(key, 'not given')}")
