#!/usr/bin/env python
"""A person runs this, or ``make kubernetes``: it checks manifests without a cluster. ``--help`` says more.

Three layers, each of which has to be clean before the next is looked at: core kinds by their own schemas in strict mode
(kubernetes-validate), the MPIJob by its types and the operator's validation (v2beta1.py), and whether all of it fits
together (objects.py, jobs.py).
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

if not __package__:  # run as a script: find the packages from any directory, and keep this folder off the path
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import yaml
from pydantic import ValidationError

from job import command
from job.errors import JobError, UsageError
from launch.kubernetes.checks import jobs, objects
from launch.kubernetes.checks.manifest import Document, Problem, all_pods, is_quantity, name
from launch.kubernetes.checks.v2beta1 import MPIJob

RENDER_SECONDS = 60
HELP = """Check the manifests of all PATHs together: everything that one namespace gets.

  python launch/kubernetes/validate.py launch/kubernetes/once launch/kubernetes/overlays/cpu

A PATH is a file of YAML documents or a folder. A folder is rendered with `kubectl kustomize` (or `kustomize build`).

exit codes: 0 all is well; 1 something is wrong, and each problem is named with its place; 2 bad usage, or not YAML
"""


def read(path: Path) -> list[Document]:
    """The documents of a file, or of a directory for kustomize.

    Raises:
        UsageError: it cannot be read or rendered, or is no list of Kubernetes objects.
    """
    try:
        text = _render(path) if path.is_dir() else path.read_text(encoding="utf-8")
        documents = [document for document in yaml.safe_load_all(text) if document is not None]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    for number, document in enumerate(documents, start=1):
        metadata = document.get("metadata") if isinstance(document, dict) else None
        if not isinstance(metadata, dict) or not {"apiVersion", "kind"} <= set(document) or not metadata.get("name"):
            raise UsageError(
                f"{path}: document {number} has not apiVersion, kind and metadata.name: no Kubernetes object"
            )
    if not documents:
        raise UsageError(f"{path}: holds no document")
    return documents


def _render(folder: Path) -> str:
    command = next((c for c in (["kubectl", "kustomize"], ["kustomize", "build"]) if shutil.which(c[0])), None)
    if not command:
        raise UsageError(f"{folder}: rendering a directory needs kubectl or kustomize on PATH, and there is neither")
    done = subprocess.run([*command, str(folder)], capture_output=True, text=True, timeout=RENDER_SECONDS)
    if done.returncode:
        raise UsageError(f"{folder}: cannot be rendered: {' '.join(done.stderr.split())}")
    return done.stdout


def problems(documents: Sequence[Document], version: str) -> list[Problem]:
    """Everything that is wrong, of the first layer in which anything is.

    Args:
        documents: all that is applied together.
        version: of Kubernetes, such as 1.31.
    """
    found = [problem for document in documents for problem in _of_one(document, version)]
    checks = (*objects.CHECKS, *jobs.CHECKS)
    return found or [problem for check in checks for problem in check(documents)]


def _of_one(document: Document, version: str) -> Iterator[Problem]:
    for path in _hollow(document):
        yield Problem(name(document), path, "is missing")
    for path in _no_quantities(document):
        yield Problem(name(document), path, "no quantity, such as 500m, 2 or 3Gi")
    if document["kind"] != "MPIJob":
        yield from _by_schema(document, version, name(document))
        return
    try:
        MPIJob.model_validate(document)
    except ValidationError as error:
        for problem in error.errors():
            path = ".".join(map(str, problem["loc"])) or "spec"
            message = problem["msg"].replace("Value error, ", "")
            unknown = problem["type"] == "extra_forbidden"
            yield Problem(name(document), path, "unknown key" if unknown else f"{message[0].lower()}{message[1:]}")
        return
    for pods in all_pods([document]):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": dict(pods.spec)}
        yield from _by_schema(pod, version, name(document), f"{pods.path}.")


def _by_schema(document: Document, version: str, shown_as: str, prefix: str = "") -> Iterator[Problem]:
    # Imported here: training machines do without it.
    try:
        import kubernetes_validate as schemas
    except ImportError:
        raise JobError("kubernetes-validate is not installed; `make setup` installs it") from None
    try:
        schemas.validate(document, version, strict=True)
    except schemas.ValidationError as error:
        path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error.path).lstrip(".")
        yield Problem(shown_as, prefix + path or "the document", str(error.message))
    except schemas.SchemaNotFoundError as error:
        yield Problem(shown_as, "kind", str(error.message))


def _no_quantities(part: Any, path: str = "") -> Iterator[str]:
    """Where a quantity should be, and is not: to the schemas any text is one."""
    for key, value in part.items() if isinstance(part, dict) else enumerate(part) if isinstance(part, list) else ():
        where = f"{path}[{key}]" if isinstance(part, list) else f"{path}.{key}".lstrip(".")
        if key in ("limits", "requests") and isinstance(value, dict):
            yield from (f"{where}.{kind}" for kind, amount in value.items() if not is_quantity(amount))
        elif key == "sizeLimit" and not is_quantity(value):
            yield where
        else:
            yield from _no_quantities(value, where)


def _hollow(document: Document) -> Iterator[str]:
    """What the API server wants, and the schemas do not ask for."""
    kind, spec = document["kind"], document.get("spec") or {}
    if kind in ("Deployment", "Job", "NetworkPolicy", "PersistentVolumeClaim", "Service") and not spec:
        yield "spec"
    elif kind in ("Deployment", "Job") and not spec.get("template", {}).get("spec", {}).get("containers"):
        yield "spec.template.spec.containers"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; --help shows the usage")


def main(arguments: Any = None) -> int:
    """Validate what the command line names. Returns the exit code."""
    parser = _Parser(prog="validate.py", description=HELP, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH")
    parser.add_argument(
        "--version", default="1.31", help="version of Kubernetes (default: 1.31, the oldest that works)"
    )
    options = parser.parse_args(arguments)
    documents = [document for path in options.paths for document in read(path)]
    found = problems(documents, options.version)
    for problem in found:
        print(f"error: {problem}", file=sys.stderr)
    where = " + ".join(map(str, options.paths))
    if not found:
        print(f"{where}: {len(documents)} documents, nothing wrong with them")
    return 1 if found else 0


if __name__ == "__main__":
    command.run(main)
