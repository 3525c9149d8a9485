"""launch/local.sh with stubs for mpirun and train.py: that it ends, how, and what it keeps from mpirun."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import termios
from pathlib import Path

import psutil
import pytest

from tests.unit.launch.scripts import PATIENCE, Project

# Deaf to all that asks, as an mpirun is that waits for a lock.
DEAF = "trap '' TERM USR1 INT HUP; sleep 1000 & echo child $!; echo started; while true; do sleep 1000; done"
# A rank that it does not wait for.
LOSES_A_RANK = """exec python -c "
import os, signal, subprocess
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
    signal.signal(number, signal.SIG_IGN)
print('child', subprocess.Popen(['sleep', '1000']).pid, flush=True)
if os.fork() == 0:
    os._exit(1)
print('started', flush=True)
while True:
    signal.pause()
"
"""


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


def first_lines(process: subprocess.Popen[str]) -> dict[str, str]:
    """What the stub of mpirun says, up to the line ``started``."""
    assert process.stdout is not None
    said = {}
    for line in process.stdout:
        name, _, value = line.strip().partition(" ")
        said[name] = value
        if name == "started":
            break
    return said


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    try:
        errors = process.communicate(timeout=PATIENCE)[1]
    except subprocess.TimeoutExpired:
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
        process.kill()
        pytest.fail("it does not end")
    return process.returncode, errors


def is_gone(pid: str) -> bool:
    try:
        return psutil.Process(int(pid)).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_an_mpirun_that_waits_for_ever_after_a_rank_has_died_is_killed_with_all_ranks(project: Project) -> None:
    project.program("mpirun", LOSES_A_RANK)
    process = project.popen("launch/local.sh", JOB_END_TIMEOUT_SECONDS="1")
    child = first_lines(process)["child"]
    code, errors = end(process)
    assert code == 1
    assert "launch/local.sh: a rank ended 1 s ago, and mpirun is still there; killing what is left" in errors
    assert is_gone(child)


@pytest.mark.parametrize("controller", [[], ["--gloo"]], ids=["mpi", "gloo"])
def test_a_second_signal_ends_a_launcher_that_hears_none(project: Project, controller: list[str]) -> None:
    project.program("mpirun", DEAF)
    project.program("horovodrun", DEAF)
    process = project.popen("launch/local.sh", *controller, JOB_END_TIMEOUT_SECONDS="1")
    child = first_lines(process)["child"]
    process.send_signal(signal.SIGTERM)
    assert process.stderr is not None
    assert "a second signal stops at once" in process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    code, errors = end(process)
    assert code == 143
    assert "after the second signal; killing what is left" in errors
    assert is_gone(child)


def test_a_terminal_that_stops_background_writers_does_not_stop_it(project: Project) -> None:
    project.program("mpirun", "echo written by a rank; echo and an error >&2")
    ours, theirs = pty.openpty()
    settings = termios.tcgetattr(theirs)
    settings[3] |= termios.TOSTOP  # stty tostop
    termios.tcsetattr(theirs, termios.TCSANOW, settings)
    process = subprocess.Popen(
        ["setsid", "--ctty", "--wait", "launch/local.sh"],
        cwd=project.root, env=project.environment(), stdin=theirs, stdout=theirs, stderr=theirs,
    )  # fmt: skip
    try:
        assert process.wait(PATIENCE) == 0
    except subprocess.TimeoutExpired:
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
        pytest.fail("it was stopped")
    assert b"written by a rank" in os.read(ours, 1000)
    os.close(ours)
    os.close(theirs)


def test_mpirun_is_told_what_keeps_it_from_waiting_and_from_misreading_names(project: Project) -> None:
    done = project.run("launch/local.sh", "--dry-run", "-np", "3")
    assert "PMIX_MCA_gds=hash" in done.stdout  # no lock in a file of TMPDIR
    assert "--mca regx naive" in done.stdout  # a host name with an underscore
    assert "-np 3" in done.stdout


def test_what_is_meant_for_other_launchers_and_jobs_does_not_reach_mpirun(project: Project) -> None:
    project.program("mpirun", "env | sort")
    meant = {"HOROVOD_FUSION_THRESHOLD": "1", "OMPI_MCA_btl_vader_eager_limit": "2", "PMIX_MCA_mca_base_verbose": "0"}
    left = {
        "OMPI_MCA_rmaps_base_mapping_policy": "ppr:1:node", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2",
        "HOROVOD_RANK": "1", "HOROVOD_SIZE": "2", "HOROVOD_LOCAL_RANK": "1", "HOROVOD_GLOO_RENDEZVOUS_ADDR": "gone",
        "PMIX_RANK": "1", "PMI_RANK": "1",
    }  # fmt: skip
    seen = dict(line.split("=", 1) for line in project.run("launch/local.sh", **meant, **left).stdout.splitlines())
    assert meant.items() <= seen.items()
    assert not left.keys() & seen.keys()


def test_folders_with_another_numpy_or_open_mpi_are_left_out_and_named(project: Project, tmp_path: Path) -> None:
    (project.root / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / "site" / "numpy").mkdir(parents=True)
    (tmp_path / "mpi").mkdir()
    (tmp_path / "mpi" / "libmpi.so.12").touch()
    (tmp_path / "own [x] folder").mkdir()
    project.program("mpirun", 'echo "path $PYTHONPATH"; echo "library $LD_LIBRARY_PATH"')
    done = project.run(
        "launch/local.sh",
        PYTHONPATH=f"{tmp_path}/site:{tmp_path}/own [x] folder",
        LD_LIBRARY_PATH=f"/opt/cuda/lib64:{tmp_path}/mpi",
    )
    assert done.stdout.splitlines() == [f"path {tmp_path}/own [x] folder", "library /opt/cuda/lib64"]
    assert f"PYTHONPATH without {tmp_path}/site," in done.stderr
    assert f"LD_LIBRARY_PATH without {tmp_path}/mpi," in done.stderr


@pytest.mark.parametrize(("code", "expected"), [(139, 1), (134, 1), (1, 1), (2, 2), (75, 75)])
def test_the_exit_code_of_a_check_that_crashes_is_that_of_a_failure(project: Project, code: int, expected: int) -> None:
    (project.root / "job" / "train.py").write_text(f"import os; os._exit({code})")
    project.program("mpirun", "echo started")
    done = project.run("launch/local.sh")
    assert (done.returncode, done.stdout) == (expected, "")


@pytest.mark.parametrize("command", [["launch/local.sh"], ["sh", "launch/local.sh"], ["../link"]])
def test_it_finds_its_project_by_each_way_of_calling_it(project: Project, tmp_path: Path, command: list[str]) -> None:
    (tmp_path / "link").symlink_to(project.root / "launch" / "local.sh")
    (tmp_path / "cd" / "launch").mkdir(parents=True)
    done = project.run(*command, "--dry-run", CDPATH=f"{tmp_path}/cd:.")
    assert done.returncode == 0, done.stderr
    assert f"python {project.root}/job/train.py" in done.stdout


@pytest.mark.parametrize("script", ["setup.sh", "slurm.sbatch", "kubernetes/launcher.sh", "cluster.sh"])
def test_each_script_may_be_called_by_sh(project: Project, script: str) -> None:
    done = project.run("sh", f"launch/{script}", "--help")
    assert "usage: " in done.stdout or script == "cluster.sh", done.stderr
    assert "Illegal option" not in done.stderr


def test_a_missing_folder_for_temporary_files_is_named_with_its_variable(project: Project, tmp_path: Path) -> None:
    done = project.run("launch/local.sh", TMPDIR=str(tmp_path / "gone"))
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        f"launch/local.sh: cannot write to {tmp_path}/gone; make that folder, free some of its disk, or name another"
        " one with TMPDIR"
    ]


def test_too_few_files_are_refused_in_words(project: Project) -> None:
    done = project.run("bash", "-c", "ulimit -n 28; launch/local.sh -np 4")
    assert done.returncode == 1
    assert "may open only 28 files here, and the launcher of 4 ranks may need 128" in done.stderr
    project.program("mpirun", "ulimit -n")
    assert project.run("bash", "-c", "ulimit -S -n 28; launch/local.sh -np 4").stdout == "128\n"


@pytest.mark.parametrize(("setting", "ranks"), [("1", "1"), ("", "2"), ("0,-1,1", "1"), ("1,0", "2")])
def test_the_ranks_are_as_many_as_the_gpus_that_cuda_shows(project: Project, setting: str, ranks: str) -> None:
    project.program("nvidia-smi", "printf 'GPU %s: A100 (UUID: GPU-%s-x)\\n' 0 a 1 b")
    assert f"-np {ranks} " in project.run("launch/local.sh", "--dry-run", CUDA_VISIBLE_DEVICES=setting).stdout


def test_mpirun_has_a_home_though_the_user_has_none(project: Project) -> None:
    project.program("mpirun", "echo ${HOME:-none}")
    home = project.run("env", "-u", "HOME", "launch/local.sh").stdout.strip()
    assert home.startswith("/") and home != "/"


def test_the_shared_memory_of_an_mpirun_that_was_killed_is_removed(project: Project) -> None:
    project.program(
        "mpirun",
        """folder=$OMPI_MCA_btl_vader_backing_directory; touch "$folder/segment" && echo "$folder"
kill -KILL $$""",
    )
    done = project.run("launch/local.sh")
    assert done.returncode == 1
    assert done.stdout.startswith("/dev/shm/local.sh.")
    assert not Path(done.stdout.strip()).exists()


def test_a_job_that_is_to_go_on_is_handed_to_the_supervisor_with_all_arguments(project: Project) -> None:
    done = project.run("launch/local.sh", "-np", "4", "--min-np", "2", "--dry-run", "x.y=1", "run.overwrite=true")
    root = project.root
    assert done.stdout == f"python {root}/launch/elastic -np 4 --min-np 2 x.y=1 run.overwrite=true \n"
    (project.bin / "python").unlink()  # a link to the one that runs the tests
    project.program("python", 'echo "$@"; exit 75')
    done = project.run("launch/local.sh", "-np", "4", "--min-np", "2")
    assert done.stdout == f"{root}/launch/elastic -np 4 --min-np 2 run.resume=auto\n"
    assert done.returncode == 75


@pytest.mark.parametrize("least", ["0", "5", "two", ""])
def test_ranks_to_go_on_with_that_are_none_or_too_many_are_refused(project: Project, least: str) -> None:
    done = project.run("launch/local.sh", "-np", "4", "--min-np", least)
    assert done.returncode == 2
    assert "--min-np takes a number of ranks, from 1 to that of -np, 4; not " in done.stderr
