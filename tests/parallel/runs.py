"""Training on the ranks of a test as ``job/train.py`` does it, and what a run leaves."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from job import run_dir
from job.config import load_config
from job.distributed.comm import Comm
from job.train import train
from job.training.learner import Learner
from tests.examples import MEASURED
from tests.parallel.conftest import ROOT

Weights = dict[str, np.ndarray]  # and running statistics, by their place in the network


class CutOff(Exception):
    """The end of a process, as far as one test process can know it."""


def run(
    comm: Comm,
    folder: str,
    overrides: list[str],
    resume: str = "never",
) -> Weights:
    """Train to the end. What this rank holds then."""
    config = load_config(overrides=[*overrides, f"run.dir={folder}", f"run.resume={resume}"])
    lock = run_dir.claim(config) if comm.rank == 0 else None
    comm.barrier("claimed")
    net = train(config, comm)
    if lock:
        lock.close()
    return {name: parameter.data().asnumpy() for name, parameter in net._collect_params_with_prefix().items()}


def cut_off(comm: Comm, folder: str, overrides: list[str], step: int, resume: str = "never") -> None:
    """Train until the step after ``step`` steps begins."""
    with cut_off_at(step):
        run(comm, folder, overrides, resume)


@contextmanager
def cut_off_at(step: int) -> Iterator[None]:
    """Let the run end, on all ranks, as it begins the step after ``step`` steps."""
    whole = Learner.step

    def cut(self: Learner, *arguments: Any) -> None:
        if self.steps == step:
            raise CutOff
        whole(self, *arguments)

    Learner.step = cut  # type: ignore[method-assign]
    try:
        with suppress(CutOff):
            yield
    finally:
        Learner.step = whole  # type: ignore[method-assign]


def sha256_of(weights: Mapping[str, np.ndarray]) -> str:
    """The hash that docs/bit_for_bit.md defines, worked out anew."""
    digest = hashlib.sha256()
    for name, array in sorted(weights.items()):
        digest.update(f"{name} {array.dtype} {'x'.join(map(str, array.shape))}\n".encode() + array.tobytes())
    return digest.hexdigest()


def records(folder: Path) -> list[dict[str, Any]]:
    """All of metrics.jsonl but the number of ranks and what a clock has measured."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in (*MEASURED, "ranks")} for line in lines]


def ranks_of(folder: Path) -> set[int]:
    """The numbers of ranks that the records name."""
    return {json.loads(line)["ranks"] for line in (folder / "metrics.jsonl").read_text().splitlines()}


def weights_of_one_rank(folder: Path) -> str:
    """The hash that a run with the configuration of the one in ``folder`` ends with, never stopped and on one rank."""
    other = folder.with_name(f"{folder.name}-on-one-rank")
    command = [sys.executable, str(ROOT / "job" / "train.py"), "--quiet", "--config", str(folder / "config.yaml")]
    subprocess.run([*command, f"run.dir={other}", "run.resume=never"], check=True, timeout=300)
    return str(json.loads((other / "summary.json").read_text())["weights_sha256"])
