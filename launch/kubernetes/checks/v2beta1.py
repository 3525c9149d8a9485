"""Imported by validate.py: the MPIJob (kubeflow.org/v2beta1) with types. It refuses what the MPI operator refuses.

From its types.go, default.go and validation.go, version 0.8.2. Beyond those, unknown keys are errors, which the API
server would drop without a word. Pod templates are left as they are: the schema of core/v1 is for them (validate.py).
"""

from __future__ import annotations

import re
from typing import Any, Dict, Literal, Optional, Union  # noqa: UP035  (pydantic evaluates them, also on Python 3.9)

from pydantic import BaseModel, ConfigDict, Field, model_validator

_INT32 = 2**31 - 1


class _Part(BaseModel):
    """Strict: the API server takes no "2" for a 2."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Metadata(_Part):
    name: str
    namespace: Optional[str] = None
    labels: Dict[str, str] = {}  # noqa: UP006
    annotations: Dict[str, str] = {}  # noqa: UP006


class SchedulingPolicy(_Part):
    """Read if the operator was started with a gang scheduler, and only then."""

    minAvailable: Optional[int] = Field(None, ge=0, le=_INT32)
    queue: str = ""
    minResources: Optional[Dict[str, Union[int, str]]] = None  # noqa: UP006, UP007
    priorityClass: str = ""
    scheduleTimeoutSeconds: Optional[int] = Field(None, ge=0, le=_INT32)


class RunPolicy(_Part):
    cleanPodPolicy: Literal["None", "Running", "All"] = "None"
    ttlSecondsAfterFinished: Optional[int] = Field(None, ge=0, le=_INT32)
    activeDeadlineSeconds: Optional[int] = Field(None, ge=0)
    backoffLimit: Optional[int] = Field(None, ge=0, le=_INT32)
    schedulingPolicy: Optional[SchedulingPolicy] = None
    suspend: bool = False
    managedBy: Literal["kubeflow.org/mpi-operator", "kueue.x-k8s.io/multikueue", None] = None


class Template(_Part):
    metadata: Dict[str, Any] = {}  # noqa: UP006
    spec: Dict[str, Any]  # noqa: UP006

    @model_validator(mode="after")
    def _as_the_operator_wants_it(self) -> Template:
        if not self.spec.get("containers"):
            raise ValueError("spec.containers must hold a container at least")
        if "restartPolicy" in self.spec:
            raise ValueError("spec.restartPolicy is overridden; set restartPolicy of the replica, beside template")
        return self


class LauncherSpec(_Part):
    replicas: Literal[1] = 1
    # The type knows Always and ExitCode too; the operator's validation refuses them.
    restartPolicy: Literal["Never", "OnFailure"] = "OnFailure"
    template: Template


class WorkerSpec(_Part):
    replicas: int = Field(ge=1, le=_INT32)  # without it the operator takes 0, and refuses that
    restartPolicy: Literal["Never", "OnFailure"] = "Never"
    template: Template


class ReplicaSpecs(_Part):
    Launcher: LauncherSpec
    Worker: Optional[WorkerSpec] = None


class Spec(_Part):
    slotsPerWorker: int = Field(1, ge=0, le=_INT32)
    runLauncherAsWorker: bool = False
    runPolicy: RunPolicy = RunPolicy()
    mpiReplicaSpecs: ReplicaSpecs
    sshAuthMountPath: str = Field("/root/.ssh", min_length=1)
    launcherCreationPolicy: Literal["AtStartup", "WaitForWorkersReady"] = "AtStartup"
    mpiImplementation: Literal["OpenMPI", "Intel", "MPICH"] = "OpenMPI"

    @property
    def workers(self) -> int:
        """The number of worker pods."""
        return self.mpiReplicaSpecs.Worker.replicas if self.mpiReplicaSpecs.Worker else 0

    @property
    def ranks(self) -> int:
        """As many as the operator's hostfile has slots."""
        return (self.workers + self.runLauncherAsWorker) * self.slotsPerWorker

    @model_validator(mode="after")
    def _schedulable(self) -> Spec:
        if not self.ranks:
            raise ValueError("there is no slot: give mpiReplicaSpecs.Worker, and slotsPerWorker of 1 or more")
        policy = self.runPolicy.schedulingPolicy
        available = policy.minAvailable if policy else None
        if self.launcherCreationPolicy == "WaitForWorkersReady" and available != self.workers:
            raise ValueError(
                f"runPolicy.schedulingPolicy.minAvailable must be the number of workers, {self.workers}, with"
                " launcherCreationPolicy WaitForWorkersReady: a gang scheduler waits for ever for more (by default one"
                " more, for the launcher) and starts a job that is not whole with fewer"
            )
        if available is not None and available > self.workers + 1:
            raise ValueError(
                f"runPolicy.schedulingPolicy.minAvailable is {available}, and there are {self.workers + 1} pods with"
                " the launcher: a gang scheduler would wait for ever"
            )
        return self


class MPIJob(_Part):
    """A manifest. ``status`` is the operator's to write, so it is an unknown key here."""

    apiVersion: Literal["kubeflow.org/v2beta1"]
    kind: Literal["MPIJob"]
    metadata: Metadata
    spec: Spec

    @model_validator(mode="after")
    def _names_its_pods(self) -> MPIJob:
        longest = f"{self.metadata.name}-worker-{max(self.spec.workers, 1) - 1}"
        if not re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", longest):
            raise ValueError(
                f"metadata.name {self.metadata.name!r} makes the host name {longest!r}: at most 63 of a-z, 0-9 and -,"
                " beginning with a letter"
            )
        return self
