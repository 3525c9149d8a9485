"""What is observed, against the real machine and against programs that answer, fail, crash and hang.

There is no GPU here: ``nvidia-smi`` is a script that prints what NVIDIA's manual shows.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from job.config import DataConfig
from job.fitness import facts
from job.fitness.facts import Answer, Data, Disk, Gpu, Gpus

Program = Callable[[str, str], Path]


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Program:
    """Makes a shell script that is the first program of that name on PATH."""
    folder = tmp_path / "programs"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def make(name: str, script: str) -> Path:
        file = folder / name
        file.write_text(f"#!/bin/sh\n{script}\n")
        file.chmod(0o755)
        return file

    return make


# --- the processor


def test_a_processor_is_its_model_and_those_instructions_that_arithmetic_is_chosen_by(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    core = "processor\t: {}\nmodel name\t: Intel(R) Xeon(R) Gold\nflags\t\t: fpu avx2 sse4_1 ht avx512f {}\n\n"
    cpuinfo.write_text(core.format(0, "fma") + core.format(1, "amx_tile"))
    assert facts.processor(cpuinfo) == "Intel(R) Xeon(R) Gold: sse4_1 avx2 fma avx512f"
    assert facts.processor(tmp_path / "none") == "unknown: "
    assert not facts.processor().startswith("unknown")


# --- GPUs

TWO_CARDS = """
case "$1" in
  --query-gpu=index,uuid,name,driver_version,compute_cap) ;;
  *) echo "unexpected: $*" >&2; exit 2 ;;
esac
echo '0, GPU-aaaa1111, NVIDIA A100-SXM4-40GB, 535.129.03, 8.0'
echo '1, GPU-bbbb2222, NVIDIA H100 80GB HBM3, 535.129.03, 9.0'
"""
A100 = Gpu("NVIDIA A100-SXM4-40GB", (8, 0), "535.129.03")
H100 = Gpu("NVIDIA H100 80GB HBM3", (9, 0), "535.129.03")


def test_without_nvidia_smi_there_are_no_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert facts.gpus({}) == Gpus()


@pytest.mark.parametrize(
    ("wanted", "seen"),
    [
        (None, (A100, H100)),
        ("0,1", (A100, H100)),
        ("1", (H100,)),
        ("GPU-aaaa", (A100,)),
        ("", ()),
        ("-1", ()),
        ("MIG-1234", ()),  # there is none of that name
    ],
)
def test_the_gpus_are_those_that_cuda_visible_devices_leaves(
    program: Program, wanted: str | None, seen: tuple[Gpu, ...]
) -> None:
    program("nvidia-smi", TWO_CARDS)
    assert facts.gpus({} if wanted is None else {"CUDA_VISIBLE_DEVICES": wanted}) == Gpus(seen)


def test_an_old_driver_that_does_not_know_capabilities_still_names_its_gpus(program: Program) -> None:
    program(
        "nvidia-smi",
        """case "$1" in
  *compute_cap*) echo 'Field "compute_cap" is not a valid field to query.'; exit 2 ;;
  *) echo '0, GPU-aaaa1111, Tesla V100, 450.80.02' ;;
esac""",
    )
    assert facts.gpus({}) == Gpus((Gpu("Tesla V100", None, "450.80.02"),))


def test_a_capability_that_is_not_available_is_none(program: Program) -> None:
    program("nvidia-smi", "echo '0, GPU-aaaa1111, GRID T4, 470.57.02, [N/A]'")
    assert facts.gpus({}) == Gpus((Gpu("GRID T4", None, "470.57.02"),))


def test_a_driver_that_does_not_answer_nvidia_smi_is_told_in_its_own_words(program: Program) -> None:
    program("nvidia-smi", "echo 'NVIDIA-SMI has failed because it cannot talk to the driver.'; echo more; exit 9")
    assert facts.gpus({}) == Gpus(error="NVIDIA-SMI has failed because it cannot talk to the driver.")


def test_an_answer_that_makes_no_sense_is_an_error_and_not_a_gpu(program: Program) -> None:
    program("nvidia-smi", "echo 'No devices were found'")
    assert facts.gpus({}) == Gpus(error="No devices were found")


def test_a_hanging_nvidia_smi_is_given_up_and_ended_with_its_children(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(facts, "GPU_SECONDS", 0.3)
    program("nvidia-smi", f"sleep 1000 & echo $! >{tmp_path}/child; wait")
    assert facts.gpus({}) == Gpus(error="no answer within 0.3 s")
    child = int((tmp_path / "child").read_text())
    deadline = time.monotonic() + 20
    while is_alive(child) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_alive(child)


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


# --- MXNet, Horovod and other programs


def imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, source: str) -> None:
    """Put a module before the real one."""
    (tmp_path / f"{module}.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


@pytest.mark.parametrize("module", ["mxnet", "horovod"])
@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("raise OSError('libcuda.so.1: cannot open\\nsecond line')", "OSError: libcuda.so.1: cannot open"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "died of SIGSEGV"),
        ("import sys; sys.exit(3)", "ended with exit code 3"),
        ("import sys; sys.exit()", "its import ended the process"),
    ],
    ids=["raises", "crashes", "exits", "exits as if all were well"],
)
def test_an_import_that_fails_is_a_fact_with_the_first_line_of_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, source: str, error: str
) -> None:
    imports(tmp_path, monkeypatch, module, source)
    assert getattr(facts, module)().error == error


def test_an_import_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    imports(tmp_path, monkeypatch, "mxnet", "import time; time.sleep(1000)")
    monkeypatch.setattr(facts, "PROBE_SECONDS", 0.3)
    assert facts.mxnet() == Answer("", "no answer within 0.3 s")


def test_what_an_import_prints_is_not_taken_for_the_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = "import atexit\nprint('{}', end='')\natexit.register(print, '{}')\n"
    imports(tmp_path, monkeypatch, "mxnet", f"{noise}class context: num_gpus = lambda: 0")
    assert facts.mxnet_on_gpus() == Answer('{"gpus": 0}')


def test_a_missing_program_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert facts.mpirun() == Answer("", "No such file or directory")


def test_the_first_line_of_a_version_is_enough(program: Program) -> None:
    program("mpirun", "echo 'mpirun (Open MPI) 4.1.8'; echo; echo 'Report bugs'")
    assert facts.mpirun() == Answer("mpirun (Open MPI) 4.1.8")


def test_a_program_that_dies_of_a_signal_is_named_by_it(program: Program) -> None:
    program("mpirun", f"kill -{signal.SIGKILL.value} $$")
    assert facts.mpirun() == Answer("", "died of SIGKILL")


# --- waiting


def test_work_that_hangs_is_left_behind() -> None:
    never = threading.Event()
    with pytest.raises(TimeoutError, match="no answer within"):
        facts.within(0.1, never.wait)
    never.set()


def test_work_that_fails_fails_here() -> None:
    with pytest.raises(ZeroDivisionError):
        facts.within(10, lambda: 1 / 0)


# --- disks


def test_free_space_is_that_of_the_file_system_where_the_folder_will_be(tmp_path: Path) -> None:
    now = facts.disk(tmp_path / "not" / "yet")
    real = shutil.disk_usage(tmp_path)
    assert now.error == "" and abs(now.free_bytes - real.free) < 1 << 30


def test_different_file_systems_are_told_apart() -> None:
    proc = os.statvfs("/proc")
    assert proc.f_files == proc.f_bavail == 0  # it counts nothing
    assert facts.disk(Path("/proc/new")) == Disk(0, None)


def test_a_disk_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    never = threading.Event()
    monkeypatch.setattr(facts, "SECONDS", 0.1)
    monkeypatch.setattr(os, "statvfs", lambda path: never.wait())
    assert facts.disk(tmp_path) == Disk(0, None, "no answer within 0.1 s")
    never.set()


def test_writing_is_tried_and_leaves_nothing(tmp_path: Path) -> None:
    before = tmp_path.stat().st_mtime_ns
    assert facts.write_error(tmp_path / "not" / "yet") == ""
    assert list(tmp_path.iterdir()) == []
    assert tmp_path.stat().st_mtime_ns > before


def test_what_cannot_be_written_says_why(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert facts.write_error(tmp_path / "file" / "run") == "Not a directory"
    assert facts.write_error(Path("/proc/run")) in ("No such file or directory", "Permission denied")


def test_a_disk_that_takes_data_but_cannot_keep_it_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", broken)
    assert facts.write_error(tmp_path) == "Input/output error"
    assert list(tmp_path.iterdir()) == []


# --- the commit


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    root = tmp_path / "checkout"
    root.mkdir()
    (root / "file").write_text("1")
    git(root, "init", "-q")
    git(root, "add", "file")
    git(root, "config", "user.name", "n")
    git(root, "config", "user.email", "e")
    git(root, "-c", "commit.gpgsign=false", "commit", "-qm", "first")
    git(root, "-c", "tag.gpgsign=false", "tag", "-a", "-m", "release", "v1")
    return root


def git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True, text=True).stdout.strip()


def test_the_commit_is_that_of_the_checkout(repository: Path) -> None:
    assert facts.commit(repository) == git(repository, "rev-parse", "HEAD")


def test_changed_code_is_dirty_and_files_of_nobody_are_not(repository: Path) -> None:
    (repository / "stray").touch()
    assert facts.commit(repository) == git(repository, "rev-parse", "HEAD")
    (repository / "file").write_text("2")
    assert facts.commit(repository) == git(repository, "rev-parse", "HEAD") + "-dirty"


def test_the_checkout_of_another_user_has_a_commit_too(repository: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("giving files to another user needs root")
    subprocess.run(["chown", "-R", "1234", str(repository)], check=True)
    assert re.fullmatch("[0-9a-f]{40}", facts.commit(repository) or "")


def test_an_image_has_the_commit_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "REVISION").write_text("abc123\n")
    assert facts.commit(tmp_path) == "abc123"


def test_a_copy_inside_another_checkout_does_not_take_that_ones_commit(repository: Path) -> None:
    (repository / "copy").mkdir()
    assert facts.commit(repository / "copy") is None


# --- the rest


def test_interfaces_have_their_ipv4_addresses() -> None:
    found = facts.interfaces()
    assert "127.0.0.1" in found["lo"]
    assert all(socket.inet_aton(address) for addresses in found.values() for address in addresses)


def test_a_name_that_nobody_knows_has_no_address() -> None:
    assert facts.address_error("localhost") == ""
    assert facts.address_error("no such host.invalid") != ""


def test_data_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from job.data import download

    monkeypatch.setattr(download, "PACKAGE_FOLDER", tmp_path / "package")
    missing = facts.data(DataConfig(cache_dir=tmp_path / "cache"))
    assert missing.folders == () and "train-images-idx3-ubyte" in missing.missing and missing.error == ""
    wrong = facts.data(DataConfig(cache_dir=tmp_path / "cache", dir=tmp_path / "nowhere"))
    assert wrong == Data(error=f"data.dir={tmp_path}/nowhere: not a folder that can be used: No such file or directory")


def test_a_numpy_that_fails_in_its_own_way_is_a_fact_and_not_the_doctors_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(sys.modules, "job.data.idx", raising=False)
    monkeypatch.delattr("job.data.idx", raising=False)

    class Broken:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "job.data.idx":
                raise AttributeError("module 'numpy' has no attribute 'ndarray'")

    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    assert facts.data(DataConfig()).error == "cannot be looked for: module 'numpy' has no attribute 'ndarray'"


def test_shared_memory_that_no_process_uses_any_more_is_left_over(tmp_path: Path) -> None:
    for name in ("vader_segment.h.0.1.0", "vader_segment.h.0.2.0", "another"):
        (tmp_path / name).touch()
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "maps").write_text(f"7f00-7f01 rw-s 00000000 00:1b 5   {tmp_path}/vader_segment.h.0.2.0\n")
    assert facts.left_in_shared_memory(tmp_path, tmp_path) == [f"{tmp_path}/vader_segment.h.0.1.0"]
    assert facts.left_in_shared_memory(tmp_path / "gone", tmp_path) == []
