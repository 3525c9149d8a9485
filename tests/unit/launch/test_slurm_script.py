"""launch/slurm.sbatch with stubs for Slurm's programs; tests/slurm has a real one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.launch.scripts import Project

ELEMENT = {"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3", "SLURM_NTASKS": "2"}


@pytest.fixture
def project(tmp_path: Path) -> Project:
    project = Project(tmp_path)
    (project.root / "launch" / "rank.py").write_text("")  # it only checks here
    project.program("srun", "env | sort")
    return project


def submitted(project: Project, script: str) -> str:
    """The copy that sbatch makes; scontrol knows where it was, for an array once for each of the elements that wait."""
    copy = project.root.parent / "slurm_script"
    copy.write_bytes((project.root / "launch" / "slurm.sbatch").read_bytes())
    project.program(
        "scontrol",
        f"""echo "scontrol $*" >&2
case $3 in 7) echo '   Command=/elsewhere/first'; echo '   Command=/elsewhere/second' ;;
7_3) echo '   Command={script} --config a b' ;; esac""",
    )
    return str(copy)


def test_the_last_element_of_an_array_finds_its_project_and_itself_alone_is_queued_again(project: Project) -> None:
    project.program("srun", "exit 75")
    project.program("squeue", '[[ "$*" == *"--jobs 7_3 "* ]] && echo RUNNING')
    copy = submitted(project, f"{project.root}/launch/slurm.sbatch")
    done = project.run("bash", copy, **ELEMENT)
    assert done.returncode == 75, done.stderr
    assert "scontrol requeue 7_3" in done.stderr
    assert "job 7_3 is queued again" in done.stdout


def test_a_script_that_was_submitted_by_a_link_finds_its_project(project: Project, tmp_path: Path) -> None:
    (tmp_path / "a link").symlink_to(project.root / "launch" / "slurm.sbatch")
    copy = submitted(project, f"{tmp_path}/a link")
    done = project.run("bash", copy, CDPATH="/", **ELEMENT)
    assert done.returncode == 0, done.stderr


def test_the_ranks_get_the_variables_that_cluster_passes_and_no_secret(project: Project) -> None:
    passed = {
        "NCCL_DEBUG": "INFO", "HOROVOD_FUSION_THRESHOLD": "1", "MXNET_ENGINE_TYPE": "NaiveEngine", "TZ": "UTC",
        "LC_ALL": "C", "https_proxy": "http://proxy", "NO_PROXY": "x", "JOB_COORDINATOR": "n1", "WANTED": "yes",
        "SLURM_JOB_ID": "1",
    }  # fmt: skip
    left = {"A_TOKEN": "secret", "XNCCL_DEBUG": "x", "HOROVOD_SIZE": "9", "HOROVOD_RANK": "8"}
    done = project.run("bash", "launch/slurm.sbatch", "-x", "WANTED", **passed, **left)
    seen = dict(line.partition("=")[::2] for line in done.stdout.splitlines())
    assert passed.items() <= seen.items()
    assert not left.keys() & seen.keys()


@pytest.mark.parametrize(("code", "expected"), [(139, 1), (143, 1), (1, 1), (2, 2), (0, 0)])
def test_the_exit_codes_are_those_of_the_contract(project: Project, code: int, expected: int) -> None:
    project.program("srun", f"exit {code}")
    assert project.run("bash", "launch/slurm.sbatch", SLURM_JOB_ID="1").returncode == expected


def test_a_check_that_crashes_is_a_failure(project: Project) -> None:
    (project.root / "launch" / "rank.py").write_text("import os; os._exit(134)")
    assert project.run("bash", "launch/slurm.sbatch", SLURM_JOB_ID="1").returncode == 1
