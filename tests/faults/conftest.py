"""Runs that are broken on purpose, in processes of their own, each within a bound."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional

import psutil
import pytest

from tests import synthetic
from tests.parallel.conftest import ROOT, environment, launcher
from tests.parallel.runs import records

PATIENCE = 90.0  # seconds for a run of 4 s; a failing test waits so long, a passing one does not


class Ended(NamedTuple):
    code: int
    output: str


class Run:
    """One run directory, and commands that train into it."""

    def __init__(self, folder: Path) -> None:
        self.data = synthetic.write(folder / "data")
        self.folder = folder / "run"

    @property
    def arguments(self) -> list[str]:
        recipe = [
            "train.epochs=3",
            "train.log_every_steps=1",
            "checkpoint.every_steps=5",
            "run.step_timeout_seconds=30",
        ]
        return [*self.data, *recipe, "optimizer.momentum=0.5", "optimizer.learning_rate=0.05", f"run.dir={self.folder}"]

    def start(self, ranks: int, *overrides: str, fault: str = "none:none:0:0") -> subprocess.Popen[str]:
        command = [*launcher(ranks), "-m", "tests.faults.broken", *self.arguments, *overrides]
        return self.popen(command, fault)

    def popen(
        self, command: Sequence[str], fault: str = "none:none:0:0", stderr: int = subprocess.STDOUT, **variables: str
    ) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env={**environment(), "FAULT": fault, "OMP_NUM_THREADS": "1", **variables},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            start_new_session=True,
        )

    def train(self, ranks: int, *overrides: str, fault: str = "none:none:0:0") -> Ended:
        return finish(self.start(ranks, *overrides, fault=fault))

    def script(self, ranks: int, *arguments: str) -> list[str]:
        return [str(ROOT / "launch" / "local.sh"), "-np", str(ranks), *self.arguments, *arguments]

    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "checkpoints").iterdir())

    def records(self) -> list[dict[str, Any]]:
        return records(self.folder)

    def weights(self, step: int = 18) -> tuple[str, str]:
        """After ``step`` steps the hash of the weights, and that of them and the optimizer's arrays."""
        manifest = json.loads((self.folder / "checkpoints" / f"step-{step:08d}" / "manifest.json").read_text())
        return manifest["weights_sha256"], manifest["files"]["arrays.params"]["sha256"]

    def processes(self) -> list[psutil.Process]:
        """All that still runs on behalf of this run."""
        found = []
        for process in psutil.process_iter(["cmdline", "status"]):
            words = process.info["cmdline"] or []
            if any(f"run.dir={self.folder}" in word for word in words) and process.info["status"] != "zombie":
                found.append(process)
        return found

    def assert_nothing_left(self, seconds: float = 20.0) -> None:
        end = time.monotonic() + seconds
        while (left := self.processes()) and time.monotonic() < end:
            psutil.wait_procs(left, timeout=1)
        assert left == []


def finish(process: subprocess.Popen[str], seconds: float = PATIENCE) -> Ended:
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        pytest.fail(f"still running after {seconds:g} s:\n{output[-5000:]}")
    return Ended(process.returncode, output)


def wait_for_line(process: subprocess.Popen[str], text: str) -> str:
    """Read the output up to the first line that holds ``text``."""
    assert process.stdout is not None
    read: Optional[str] = None
    lines = []
    while read != "":
        read = process.stdout.readline()
        lines.append(read)
        if text in read:
            return "".join(lines)
    pytest.fail(f"no {text!r} in:\n{''.join(lines)}")


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    run = Run(tmp_path)
    yield run
    for process in run.processes():
        process.kill()


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run never stopped, at two ranks."""
    run = Run(tmp_path_factory.mktemp("whole"))
    ended = run.train(2)
    assert ended.code == 0, ended.output
    return run
