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


ALLOCATION = {
    "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-4]", "SLURM_TASKS_PER_NODE": "2(x3),1", "SLURM_NTASKS": "7",
}  # fmt: skip


def test_a_job_that_goes_on_is_handed_to_cluster_with_its_nodes_and_what_may_be_passed_on(project: Project) -> None:
    project.program("scontrol", '[ "$*" = "show hostnames n[1-4]" ] && printf "n%d\\n" 1 2 3 4')
    handed = project.root / "launch" / "cluster.sh"
    handed.write_text(
        '#!/bin/bash\nprintf "<%s>" "$@"\necho\nfor word; do [[ -f $word ]] && cat "$word"; done; exit 0\n'
    )
    variables = {"WANTED": "yes", "NCCL_DEBUG": "INFO", "A_TOKEN": "secret", "CUDA_VISIBLE_DEVICES": "5"}
    own = ["--min-np", "2", "-x", "WANTED", "train.epochs=3", "run.dir=a b"]
    done = project.run("bash", "launch/slurm.sbatch", *own, **variables, **ALLOCATION, JOB_COORDINATOR="10.0.0.1")
    assert done.returncode == 0, done.stderr
    words, *hosts = done.stdout.splitlines()
    assert hosts == ["n1:2", "n2:2", "n3:2", "n4:1"]
    assert words.startswith("<--srun><--min-np><2><--max-np><7><--launcher-address><10.0.0.1>")
    assert words.endswith("><train.epochs=3><run.dir=a b>")
    assert "<-x><WANTED>" in words and "<-x><NCCL_DEBUG>" in words
    assert "TOKEN" not in words and "SLURM" not in words
    assert "CUDA_VISIBLE_DEVICES" not in words, "each node has its own numbers"
    file = words.removesuffix("><train.epochs=3><run.dir=a b>").rpartition("<")[2]
    assert not (project.root / file).exists()


@pytest.mark.parametrize("given", [[], ["0"], ["two"], ["train.epochs=3"]])
def test_a_least_number_of_ranks_that_is_none_is_told_before_the_job_is_submitted(
    project: Project, given: list[str]
) -> None:
    done = project.run("bash", "launch/slurm.sbatch", "--dry-run", "--min-np", *given)
    assert done.returncode == 2
    assert done.stderr == (f"launch/slurm.sbatch: --min-np takes the least number of ranks, not '{''.join(given)}'\n")


def test_a_job_that_goes_on_is_queued_again_after_75(project: Project) -> None:
    project.program("scontrol", 'echo "scontrol $*" >&2; echo n1')
    project.program("squeue", "echo RUNNING")
    (project.root / "launch" / "cluster.sh").write_text("#!/bin/bash\nexit 75\n")
    one = {**ALLOCATION, "SLURM_JOB_NODELIST": "n1", "SLURM_TASKS_PER_NODE": "2"}
    done = project.run("bash", "launch/slurm.sbatch", "--min-np", "1", **one)
    assert done.returncode == 75, done.stderr
    assert "scontrol requeue 7" in done.stderr


@pytest.mark.parametrize(("code", "expected"), [(139, 1), (143, 1), (1, 1), (2, 2), (0, 0)])
def test_the_exit_codes_are_those_of_the_contract(project: Project, code: int, expected: int) -> None:
    project.program("srun", f"exit {code}")
    assert project.run("bash", "launch/slurm.sbatch", SLURM_JOB_ID="1").returncode == expected


def test_a_check_that_crashes_is_a_failure(project: Project) -> None:
    (project.root / "launch" / "rank.py").write_text("import os; os._exit(134)")
    assert project.run("bash", "launch/slurm.sbatch", SLURM_JOB_ID="1").returncode == 1
