"""The images, built from the very Dockerfile and run: ``make image-test``, and ``make image-test TARGET=gpu``.

Every container here has no network, no capability, no way to gain one, and, unless a test says otherwise, a root file
system that is mounted read-only with /tmp and /runs alone to write to: what a restricted pod gets.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cuda import nvrtc
from tests.image import container
from tests.image.container import ROOT, USER, Image

TARGET = os.environ.get("TARGET", "cpu")
SSHD = "/usr/sbin/sshd -De -f /home/mpiuser/.sshd_config"
LENT = "/usr/local/nvidia/lib64"  # where some clusters mount the driver's libraries; sshd's configuration names it too
DRIVER = {"LD_LIBRARY_PATH": LENT} if TARGET == "gpu" else {}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(container.BUILD_SECONDS),
    pytest.mark.skipif(bool(container.why_not()), reason=container.why_not() or "-"),
]


@pytest.fixture(scope="module")
def image(request: pytest.FixtureRequest) -> Iterator[Image]:
    started = time.monotonic()
    container.keep_mounts_private()
    with Image(container.build(TARGET)) as image:
        terminal = request.config.pluginmanager.get_plugin("terminalreporter")
        terminal.write_line(f"\nimage {TARGET}: {image.megabytes} MB, built in {time.monotonic() - started:.0f} s")
        if TARGET == "gpu":
            lend_driver(image)
        yield image


def lend_driver(image: Image) -> None:
    """As a container runtime does: libcuda.so.1, which finds no GPU here. The stage that compiles has one, to link."""
    with Image(container.build("build-gpu")) as stage:
        library = next(stage.root.glob("usr/lib/x86_64-linux-gnu/nvidia/current/libcuda.so.*.*"))
        (image.root / LENT[1:]).mkdir(parents=True)
        shutil.copy(library, image.root / LENT[1:] / "libcuda.so.1")


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    folder = tmp_path / "runs"
    folder.mkdir()
    return folder


@pytest.fixture
def ssh(tmp_path: Path) -> Path:
    """One key pair for all pods, in the names, with the owner and the rights of a Secret mounted for group 1000."""
    folder = tmp_path / "ssh"
    folder.mkdir()
    make_key(folder)
    return folder


def make_key(folder: Path) -> None:
    key = folder / "id_rsa"
    subprocess.run(["ssh-keygen", "-q", "-t", "rsa", "-N", "", "-f", str(key)], check=True)
    (folder / "authorized_keys").write_bytes((folder / "id_rsa.pub").read_bytes())
    for file in folder.iterdir():
        os.chown(file, 0, USER)
        file.chmod(0o440)


def summary(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "summary.json").read_text()))


def steps(folder: Path) -> int:
    """The last step that the metrics tell of; 0 if there are none yet."""
    file = folder / "metrics.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return max((json.loads(line)["step"] for line in lines), default=0)


def test_it_trains_twenty_steps_on_two_ranks_from_a_read_only_root(image: Image, runs: Path) -> None:
    recipe = ["train.epochs=1", "train.max_steps=20", "run.device=cpu", "run.dir=/runs/first"]
    code, said = image.run("launch/local.sh", "-np", "2", *recipe, runs=runs, **DRIVER)
    assert code == 0, said
    done = summary(runs / "first")
    assert (done["ranks"], done["steps"], done["test_examples"]) == (2, 20, 10000)
    assert done["test_accuracy"] > 0.3  # it learned: ten classes
    assert {path.stat().st_uid for path in runs.rglob("*")} == {USER}


def test_its_own_command_is_stopped_with_a_checkpoint_and_75_and_goes_on(image: Image, runs: Path) -> None:
    folder = runs / "fashion_mnist"
    trained = 0
    for _ in range(2):
        run = image.start(runs=runs, read_only=False, **DRIVER)
        run.wait_for(lambda: steps(folder) > trained)  # noqa: B023  (called in this turn of the loop alone)
        run.signal(signal.SIGTERM)
        code, said = run.finish()
        assert code == 75, said
        newest = max((folder / "checkpoints").glob("step-*/manifest.json"))
        assert int(newest.parent.name.partition("-")[2]) > trained  # also than where the first one stopped
        trained = steps(folder)


def test_help_and_a_bad_configuration_have_their_exit_codes(image: Image, runs: Path) -> None:
    assert image.run("launch/local.sh", "--help", runs=runs)[0] == 0
    code, said = image.run("launch/local.sh", "train.epocks=1", runs=runs, **DRIVER)
    assert code == 2
    assert "train.epocks" in said


@pytest.mark.skipif(not (ROOT / "job/doctor.py").exists(), reason="there is no job/doctor.py")
def test_the_doctor_can_be_asked(image: Image, runs: Path) -> None:
    code, said = image.run("python", "job/doctor.py", "--json", "run.dir=/runs/none", runs=runs)
    report = json.loads(said[said.index("{") :])
    assert report["facts"]["data"] is True
    assert code in (0, 1)


def test_nothing_is_the_users_but_home_runs_and_scratch(image: Image, runs: Path) -> None:
    find = "find / -xdev -writable ! -type l 2>/dev/null; id --user; grep -E 'CapEff|NoNewPrivs' /proc/self/status"
    code, said = image.run("sh", "-c", find, runs=runs, read_only=False)
    *writable, user, capabilities, no_new_privileges = said.splitlines()
    assert code == 0
    assert (user, capabilities.split()[1], no_new_privileges.split()[1]) == (str(USER), "0" * 16, "1")
    scratch = r"/(tmp|var/tmp|run/lock|runs|home/mpiuser)(/.*)?"
    assert [path for path in writable if not re.fullmatch(scratch, path)] == []
    assert "/home/mpiuser" in writable  # the search does find


def test_no_file_gives_privileges_and_no_host_key_is_shared(image: Image) -> None:
    files = [path for path in image.root.rglob("*") if path.is_file() and not path.is_symlink()]
    assert len(files) > 5000
    assert [path for path in files if path.stat().st_mode & 0o6000] == []
    assert [path for path in files if "ssh_host" in path.name] == []


def test_what_built_it_is_left_behind(image: Image) -> None:
    installed = image.root.glob("opt/job/.venv/lib/python3*/site-packages/*.dist-info")
    packages = {path.name.partition("-")[0] for path in installed}
    assert packages >= {"horovod", "numba", "tensorboard"}
    assert packages & {"pip", "cmake", "wheel", "pytest", "mypy", "ruff", "selenium", "kubernetes_validate"} == set()
    programs = {path.name for folder in ("usr/bin", "opt/job/.venv/bin") for path in (image.root / folder).iterdir()}
    assert "horovodrun" in programs
    assert programs & {"gcc", "cc", "g++", "make", "cmake", "pip", "nvcc", "gcc-12"} == set()
    for leftover in ("opt/job/.setup", "opt/job/tests", "opt/job/.git", "root/.cache", "var/lib/apt/lists/lock"):
        assert not (image.root / leftover).exists(), leftover


def test_it_tells_an_engine_what_it_is(image: Image) -> None:
    config = image.config
    assert config["User"] == "1000:1000"
    assert config["Entrypoint"] == ["tini", "--"]
    assert config["StopSignal"] == "SIGTERM"
    labels = {key.rpartition(".")[2]: value for key, value in config["Labels"].items() if "opencontainers" in key}
    assert labels.keys() >= {"title", "description", "source", "licenses", "version", "revision"}
    assert labels["revision"] == "a-test"


def test_a_run_in_it_knows_the_commit(image: Image, runs: Path) -> None:
    ask = "from job.fitness.facts import commit; print(commit())"
    assert image.run("python", "-c", ask, runs=runs, **DRIVER) == (0, "a-test\n")


def test_sshd_runs_as_the_user_and_a_login_finds_the_jobs_python(image: Image, runs: Path, ssh: Path) -> None:
    script = 'id --user; python -c "import sys, mxnet, horovod.mxnet; print(sys.prefix)"'
    login = f"ssh -o ConnectionAttempts=30 localhost '{script}'"
    code, said = image.run("bash", "-c", f"{SSHD} & {login}", runs=runs, ssh=ssh)
    assert code == 0, said
    assert "Server listening on 0.0.0.0 port 2222" in said
    assert f"\n{USER}\n/opt/job/.venv\n" in said


def test_sshd_refuses_another_key(image: Image, runs: Path, ssh: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    make_key(tmp_path / "other")
    (ssh / "authorized_keys").write_bytes((tmp_path / "other" / "id_rsa.pub").read_bytes())
    code, said = image.run("bash", "-c", f"{SSHD} & ssh -o ConnectionAttempts=30 localhost true", runs=runs, ssh=ssh)
    assert code == 255
    assert "Permission denied (publickey)" in said


@pytest.mark.skipif(TARGET != "gpu", reason="the cpu image has no CUDA libraries")
def test_every_cuda_library_is_in_the_image_but_the_drivers(image: Image, runs: Path) -> None:
    packages = ".venv/lib/python3*/site-packages"
    code, said = image.run("sh", "-c", f"ldd {packages}/mxnet/libmxnet.so {packages}/horovod/mxnet/*.so", runs=runs)
    assert code == 0, said
    found = dict(re.findall(r"^\s+(\S+) => (not found|\S+)", said, re.MULTILINE))
    cuda = "libcudart.so.11.0 libcublas.so.11 libcudnn.so.8 libcusolver.so.11 libcufft.so.10 libcurand.so.10"
    assert {*cuda.split(), "libnccl.so.2", "libnvrtc.so.11.2", "libmpi.so.40"} <= found.keys()
    assert [name for name, where in found.items() if where == "not found"] == ["libcuda.so.1"]


@pytest.mark.skipif(TARGET != "gpu", reason="the cpu image has no NCCL")
def test_horovod_was_built_with_nccl_and_imports_where_a_driver_is_lent(image: Image, runs: Path) -> None:
    ask = "import mxnet, horovod.mxnet as hvd; print(mxnet.runtime.Features().is_enabled('CUDA'), hvd.nccl_built() > 0)"
    code, said = image.run("python", "-c", ask, runs=runs, **DRIVER)
    assert (code, said.split()) == (0, ["True", "True"]), said


@pytest.mark.skipif(TARGET != "gpu", reason="the cpu image has no NVRTC")
def test_the_kernels_compile_in_it_for_every_gpu_that_mxnet_supports(image: Image, runs: Path) -> None:
    code, said = image.run("python", "-c", Path(nvrtc.__file__).read_text(), runs=runs, **DRIVER)
    assert code == 0, said
    report = json.loads(said.splitlines()[-1])
    assert [Path(path).name for path in report["libraries"]] == ["libnvrtc.so.11.2"]  # the one that MXNet called
    kernels = re.findall(r'extern "C" __global__ void (\w+)', (ROOT / "job/operators/batch_norm.cu").read_text())
    every = (f"{target} {dtype}" for target, dtype in itertools.product(nvrtc.TARGETS, nvrtc.DTYPES))
    assert report["spilled_bytes"] == {each: dict.fromkeys(kernels, 0) for each in every}
