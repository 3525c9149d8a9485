"""Every command that a user types, with output that knows only ASCII, or none at all, and a path of any bytes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import synthetic

ROOT = Path(__file__).resolve().parents[2]
ODD = os.fsdecode(b"m\xc3\xbcll\xff")
CLUSTER = [str(ROOT / "launch" / "cluster.sh"), "--dry-run", f"{ODD}/hosts"]
COMMANDS = {
    "train": [sys.executable, str(ROOT / "job" / "train.py"), "--check"],
    "data": [sys.executable, "-m", "job.data"],
    "rank": [sys.executable, str(ROOT / "launch" / "rank.py"), "--dry-run"],
    "cluster": CLUSTER,
}
TASK = {"JOB_COMPLETION_INDEX": "0", "JOB_HOSTS": "1", "JOB_RANKS_PER_HOST": "1", "JOB_COORDINATOR": "localhost"}


def run(command: list[str], folder: Path, closed: str = "") -> subprocess.CompletedProcess[bytes]:
    own = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "HOROVOD_", "OMPI_"))}
    environment = {**own, **TASK, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT), "COLUMNS": "0"}
    shell = ["sh", "-c", f'"$0" "$@" {closed}', *command]
    return subprocess.run(shell, cwd=folder, env=environment, capture_output=True, timeout=60)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / ODD).mkdir()
    (tmp_path / ODD / "hosts").write_text("127.0.0.1\n")
    return tmp_path


@pytest.mark.parametrize("name", COMMANDS)
def test_a_path_of_any_bytes_is_shown_in_ascii(name: str, folder: Path) -> None:
    done = run([*COMMANDS[name], *synthetic.write(folder / ODD / "data"), f"run.dir={ODD}/run"], folder)
    assert done.returncode == 0, done.stderr
    assert rb"ll\udcff" in done.stdout.lower()  # not "ü", which is \xfc here and \xFC in YAML


@pytest.mark.parametrize("name", COMMANDS)
def test_a_mistake_ends_with_2_though_nothing_can_be_printed(name: str, folder: Path) -> None:
    command = [word.replace("--dry-run", "--check") for word in COMMANDS[name]]
    assert run([*command, f"run.such={ODD}"], folder, ">&- 2>&-").returncode == 2
    told = run([*command, f"run.such={ODD}"], folder)
    assert told.returncode == 2 and b"Traceback" not in told.stderr and b"run.such" in told.stderr
