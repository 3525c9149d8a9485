"""Imported by validate.py: what no schema sees of this job. Do the manifests fit the image and the training?

Each check takes all documents that are applied together, each valid by itself, and yields what does not fit.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

from job.config import ROOT, Config, load_config
from job.errors import JobError, Preempted, UsageError
from launch.kubernetes.checks.manifest import (
    GPU,
    IN_IMAGE,
    INDEXED_SCRIPT,
    RANK_SCRIPT,
    SSHD,
    SSHD_CONFIG,
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

PROGRAMS = {SSHD, "bash", "python", "tensorboard", "tini"}  # of the image, beside the files of this repository
IMAGE = re.compile(r"(?:[\w.:-]+/)*horovod-gluon-job:(cpu|gpu)(?:-[\w.-]+)?")
CHECKPOINT_SECONDS = 60  # what a pod that is put out must have at least, for a step and its checkpoint


def image(documents: Sequence[Document]) -> Iterator[Problem]:
    """The image is one that the Dockerfile builds, and has the commands and files that are named."""
    for pods in all_pods(documents):
        for path, container in pods.containers:
            match = IMAGE.fullmatch(container.get("image", ""))
            if not match:
                message = (
                    f"{container.get('image')!r} is none of horovod-gluon-job:cpu and :gpu, which the Dockerfile builds"
                )
                yield Problem(pods.document, f"{path}.image", message)
            elif (match[1] == "gpu") != bool(limits_of(container).get(GPU)):
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


def ssh(documents: Sequence[Document]) -> Iterator[Problem]:
    """The pods of an MPIJob agree with launch/kubernetes/sshd_config, and end their ranks before they go."""
    config = _sshd_config()
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
                if SSHD not in command_line(container):
                    continue
                if command_line(container) != [SSHD, "-De", "-f", SSHD_CONFIG]:
                    message = f"sshd is to run as {SSHD} -De -f {SSHD_CONFIG}, in the foreground and as uid {UID}"
                    yield Problem(name(document), f"{path}.command", message)
                if int(config["Port"]) not in ports_of(container):
                    message = f"sshd_config has port {config['Port']}, the container {_listed_ports(container)}"
                    yield Problem(name(document), f"{path}.ports", message)
                if "preStop" not in container.get("lifecycle", {}):
                    message = "without it SIGTERM reaches sshd alone, and the ranks are killed without a checkpoint"
                    yield Problem(name(document), f"{path}.lifecycle.preStop", message)


def _sshd_config() -> dict[str, str]:
    return dict(re.findall(r"(?m)^(\w+) +(.*)$", (ROOT / "launch/kubernetes/sshd_config").read_text()))


def _listed_ports(container: Mapping[str, Any]) -> str:
    return ", ".join(sorted({str(port) for port in ports_of(container).values()})) or "none"


def grace(documents: Sequence[Document]) -> Iterator[Problem]:
    """Pods of the job get the time for a step and its checkpoint."""
    for pods in all_pods(documents):
        seconds = pods.spec.get("terminationGracePeriodSeconds", 30)
        if pods.of_job and seconds < CHECKPOINT_SECONDS:
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
            cores = sum(quantity(limits_of(container).get("cpu", 0)) for _, container in pods.containers)
            if cores < per_pod:
                yield Problem(
                    name(document), path, f"{per_pod} ranks a pod share {cores:g} cores; give each one at least"
                )


def elastic(documents: Sequence[Document]) -> Iterator[Problem]:
    """A job that goes on with fewer workers also begins with fewer, and may have as many ranks as there are."""
    for document in documents:
        own, slots = list(all_pods([document])), _ranks_per_pod(document)
        options = next((found for pods in own for _, c in pods.containers if (found := _elastic_options(c))), {})
        if "--min-np" not in options:
            continue
        ranks = slots * sum(pods.count for pods in own if pods.trains)
        least, most = options["--min-np"], options.get("--max-np", ranks)
        if not least <= ranks <= most:
            message = f"the pods have {ranks} ranks, which is not from --min-np {least} to --max-np {most}"
            where = "mpiReplicaSpecs.Worker.replicas" if document["kind"] == "MPIJob" else "parallelism"
            yield Problem(name(document), f"spec.{where}", message)
        if document["kind"] == "MPIJob":
            yield from _begins_with(1 + -(-least // max(slots, 1)), document)


def _begins_with(pods: int, document: Document) -> Iterator[Problem]:
    spec = document["spec"]
    if spec.get("launcherCreationPolicy") == "WaitForWorkersReady":
        message = "must be AtStartup with --min-np, or the job begins only when all workers are there"
        yield Problem(name(document), "spec.launcherCreationPolicy", message)
    if spec.get("runPolicy", {}).get("schedulingPolicy", {}).get("minAvailable") != pods:
        message = f"must be {pods}, the launcher and the workers for --min-np, or a gang scheduler waits for more"
        yield Problem(name(document), "spec.runPolicy.schedulingPolicy.minAvailable", message)


def _elastic_options(container: Mapping[str, Any]) -> dict[str, int]:
    """``--min-np`` and ``--max-np``, if it runs the launcher and has them."""
    words = command_line(container)
    return {word: _number(number) for word, number in zip(words, words[1:]) if word in ("--min-np", "--max-np")}


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
        if INDEXED_SCRIPT in command_line(own.spec["containers"][0]):
            yield from _launched_by_pod_0(document, own)
        elif _number(variables.get("JOB_COORDINATOR_PORT")) not in ports_of(own.spec["containers"][0]):
            yield Problem(name(document), f"{where}: JOB_COORDINATOR_PORT", "is no port of the container")
        yield from _named_by_service(documents, document, own, subdomain)
        yield from _forgives(document)


def _launched_by_pod_0(document: Document, own: Pods) -> Iterator[Problem]:
    """Pod 0 reaches the others over ssh, its success is that of the job, and a pod that is killed is replaced alone."""
    spec, container = document["spec"], own.spec["containers"][0]
    path, config = f"{own.path}.spec", _sshd_config()
    if int(config["Port"]) not in ports_of(container):
        message = f"sshd_config has port {config['Port']}, the container {_listed_ports(container)}"
        yield Problem(name(document), f"{path}.containers[0].ports", message)
    keys = str(Path(config["HostKey"]).parent)
    mounts = container.get("volumeMounts", ())
    if not any("secret" in own.volume(mount) and mount["mountPath"] == keys for mount in mounts):
        message = f"there is no Secret at {keys}, where sshd_config has the keys of the job"
        yield Problem(name(document), f"{path}.containers[0].volumeMounts", message)
    if {"succeededIndexes": "0"} not in spec.get("successPolicy", {}).get("rules", ()):
        message = 'needs a rule `succeededIndexes: "0"`: the other pods do not end by themselves'
        yield Problem(name(document), "spec.successPolicy", message)
    if not spec.get("backoffLimitPerIndex"):
        message = "without it one pod that is killed ends the job, and the others could go on"
        yield Problem(name(document), "spec.backoffLimitPerIndex", message)


def _named_by_service(
    documents: Sequence[Document], document: Document, own: Pods, subdomain: Optional[str]
) -> Iterator[Problem]:
    service = next((d for d in documents if name(d) == f"Service/{subdomain}"), None)
    if not service:
        yield Problem(name(document), f"{own.path}.spec.subdomain", f"there is no Service {subdomain} to name the pods")
        return
    wanted = {"clusterIP": "None", "publishNotReadyAddresses": True}
    yield from demand(name(service), "spec", service["spec"], wanted)
    if not own.has_labels(service["spec"].get("selector", {})):
        yield Problem(name(service), "spec.selector", f"does not select the pods of {name(document)}")


def _forgives(document: Document) -> Iterator[Problem]:
    spec = document["spec"]
    rules = spec.get("podFailurePolicy", {}).get("rules", ())
    if spec["template"]["spec"].get("restartPolicy") != "Never":
        yield Problem(name(document), "spec.template.spec.restartPolicy", "must be Never for a podFailurePolicy")
    for outcome, action in ((Preempted, "Ignore"), (JobError, "FailJob"), (UsageError, "FailJob")):
        code = outcome.exit_code
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
                ranks = max(ranks, _elastic_options(container).get("--max-np", 0))
                arguments = _train_arguments(command_line(container))
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
            rest = _without_elastic_options(words[index + 1 :])
            return rest[1:] if rest[:1] == ["/etc/mpi/hostfile"] else rest
        if word in (RANK_SCRIPT, INDEXED_SCRIPT):
            return _without_elastic_options(words[index + 1 :])
    return None


def _without_elastic_options(words: Sequence[str]) -> Sequence[str]:
    while words[:1] in (["--min-np"], ["--max-np"]):
        words = words[2:]
    return words


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


CHECKS = (image, ssh, grace, slots, elastic, indexed_job, training)
