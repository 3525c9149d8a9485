"""The shell launchers in a project of stubs, so that what a test is about is all that happens."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
PATIENCE = 60.0  # seconds for what takes one or two; a failing test waits so long, a passing one does not


class Project:
    """A copy of launch/, a train.py of one's own, and programs that stand before all others on PATH."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "project"
        self.bin = folder / "bin"
        self.bin.mkdir(parents=True)
        shutil.copytree(ROOT / "launch", self.root / "launch", ignore=shutil.ignore_patterns("__pycache__"))
        (self.root / "job" / "distributed").mkdir(parents=True)
        shutil.copy(ROOT / "job" / "distributed" / "gpus.py", self.root / "job" / "distributed")
        (self.root / "job" / "train.py").write_text("")
        (self.bin / "python").symlink_to(sys.executable)
        self.program("horovodrun", "exit 0")
        self.program("mpirun", "exit 0")

    def program(self, name: str, text: str) -> None:
        """Put a shell script on PATH."""
        file = self.bin / name
        file.write_text(f"#!/bin/bash\n{text}\n")
        file.chmod(0o755)

    def environment(self, **variables: str) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "OMP", "CUDA_"))}
        return {**kept, "PATH": f"{self.bin}:/usr/bin:/bin", **variables}

    def popen(self, *command: str, **variables: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command, cwd=self.root, env=self.environment(**variables), stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip

    def run(self, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a command in the project's folder to its end."""
        return subprocess.run(
            command, cwd=self.root, env=self.environment(**variables), stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=PATIENCE,
        )  # fmt: skip
