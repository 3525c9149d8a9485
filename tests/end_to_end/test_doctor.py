"""The doctor on this very machine, and on ones that are broken for it: real imports, a made-up ``nvidia-smi``."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
DOCTOR = ["python", str(ROOT / "job" / "doctor.py")]


def user_runs(command: list[str], folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """A command as a user gives it in ``folder``, with the environment's programs on PATH."""
    environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    for name in ("PYTHONPATH", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"):
        environment.pop(name, None)
    environment.update(variables)
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the doctor says of this machine, and the time around it."""
    start = time.time()
    done = user_runs([*DOCTOR, "--json", "run.dir=new/run"], tmp_path_factory.mktemp("elsewhere"))
    assert done.returncode == 0, done.stdout + done.stderr
    return {**json.loads(done.stdout), "start": start, "end": time.time()}


def test_the_facts_are_true(here: dict[str, Any]) -> None:
    facts = here["facts"]
    assert facts["hostname"] == socket.gethostname()
    assert facts["python"] == sys.version.split()[0]
    assert facts["packages"]["horovod"] == metadata.version("horovod") and facts["packages"]["numpy"] == "1.23.5"
    assert here["start"] <= facts["clock_unix_seconds"] <= here["end"]
    assert abs(facts["free_disk_bytes"] - psutil.disk_usage(str(Path.cwd())).free) < 10 << 30
    assert facts["interfaces"]["lo"] == ["127.0.0.1"]
    if (ROOT / ".git").exists():
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
        assert facts["commit"].partition("-")[0] == head


def test_the_environment_that_setup_made_is_sound(here: dict[str, Any]) -> None:
    found = {check["name"]: check for check in here["checks"]}
    for name in ("python", "numpy", "wheel", "mxnet", "horovod", "mpirun", "horovodrun", "run.dir"):
        assert found[name]["status"] == "ok", found[name]
    assert "oneDNN" in found["mxnet"]["message"] and "Gloo, MPI" in found["horovod"]["message"]


def test_a_broken_mxnet_is_a_failed_check_and_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "mxnet.py").write_text("raise OSError('libcuda.so.1: cannot open shared object file')")
    done = user_runs([*DOCTOR, "--json"], tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert done.stderr == "error: not fit for this run: mxnet, horovod\n"
    (check,) = (check for check in json.loads(done.stdout)["checks"] if check["name"] == "mxnet")
    assert "libcuda.so.1" in check["message"] and "NVIDIA driver" in check["remedy"]


def with_gpu(folder: Path, name: str, capability: str) -> str:
    """A PATH on which an ``nvidia-smi`` shows one GPU."""
    folder.mkdir()
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\necho '0, GPU-1, {name}, 535.129.03, {capability}'\n")
    (folder / "nvidia-smi").chmod(0o755)
    return f"{folder}{os.pathsep}{BIN}{os.pathsep}{os.environ['PATH']}"


def with_gpu_wheel(folder: Path) -> str:
    """A PYTHONPATH on which MXNet's GPU wheel seems to be installed."""
    (folder / "mxnet_cu112-1.9.1.dist-info").mkdir(parents=True)
    (folder / "mxnet_cu112-1.9.1.dist-info" / "METADATA").write_text("Name: mxnet-cu112\nVersion: 1.9.1\n")
    return str(folder)


def test_on_a_hopper_gpu_training_ends_with_the_doctors_sentence_before_it_starts(tmp_path: Path) -> None:
    path, packages = with_gpu(tmp_path / "bin", "NVIDIA H100", "9.0"), with_gpu_wheel(tmp_path / "packages")
    doctor = user_runs([*DOCTOR, "--json"], tmp_path, PATH=path, PYTHONPATH=packages)
    assert doctor.returncode == 1
    (check,) = (check for check in json.loads(doctor.stdout)["checks"] if check["name"] == "gpu")
    assert "compute capability 9.0" in check["message"] and "run.device=cpu" in check["remedy"]
    train = [str(ROOT / "launch" / "local.sh"), "-np", "2", "run.dir=run"]
    refused = user_runs(train, tmp_path, PATH=path, PYTHONPATH=packages)
    assert refused.returncode == 2 and not (tmp_path / "run").exists()
    assert refused.stderr == f"error: {check['message']}; {check['remedy']}\n"


@pytest.mark.parametrize(
    ("arguments", "words"), [(["train.epoch=1"], "train.epoch"), (["--verbose"], "--help"), (["-np", "x"], "-np")]
)
def test_wrong_usage_ends_with_2_and_one_message(tmp_path: Path, arguments: list[str], words: str) -> None:
    done = user_runs([*DOCTOR, *arguments], tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and words in done.stderr and "Traceback" not in done.stderr


def test_a_python_without_the_packages_is_sent_to_make_setup(tmp_path: Path) -> None:
    done = user_runs([sys.executable, "-S", str(ROOT / "job" / "doctor.py")], tmp_path)  # -S: no installed packages
    assert done.returncode == 1 and done.stdout == ""
    assert "make setup" in done.stderr and len(done.stderr.splitlines()) == 1
