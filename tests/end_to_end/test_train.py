"""The user's own commands, from another directory, and what they leave."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests import synthetic

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
SMOKE = ["--config", str(ROOT / "configs" / "smoke.yaml")]


def user_runs(command: list[str], folder: Path, timeout: float = 200) -> subprocess.CompletedProcess[str]:
    """A command as a user gives it in ``folder``, where the project is not, with the environment's programs on PATH."""
    return subprocess.run(command, cwd=folder, env=of_user(), capture_output=True, text=True, timeout=timeout)


def of_user() -> dict[str, str]:
    environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    environment.pop("PYTHONPATH", None)
    return environment


def records_of(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of one smoke run on two ranks, and what it printed."""
    folder = tmp_path_factory.mktemp("elsewhere")
    command = ["horovodrun", "-np", "2", "python", str(ROOT / "job" / "train.py"), *SMOKE, "run.dir=here/run"]
    done = user_runs(command, folder)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder / "here" / "run", done.stdout


def test_the_summary_holds_what_other_tools_read(smoke: tuple[Path, str]) -> None:
    summary = json.loads((smoke[0] / "summary.json").read_text())
    assert (summary["ranks"], summary["epochs"], summary["steps"]) == (2, 1, 40)
    assert (summary["test_examples"], summary["train_examples_per_epoch"]) == (10000, 60000)
    assert (summary["mxnet"], summary["horovod"], summary["sync_batch_norm"]) == ("1.9.1", "0.28.1", True)
    assert 0.2 < summary["test_accuracy"] < 1 and summary["images_per_second"] > 0 and summary["test_loss"] > 0


def test_metrics_are_one_json_object_a_line_with_rising_steps(smoke: tuple[Path, str]) -> None:
    records = records_of(smoke[0])
    train = [record for record in records if record["split"] == "train"]
    assert [record["step"] for record in train] == list(range(1, 41))  # smoke logs every step
    assert train[-1]["loss"] < train[0]["loss"] < 2.4
    assert [record["step"] for record in records if record["split"] == "test"] == [40]
    assert all({"epoch", "loss", "accuracy"} <= set(record) for record in records)


def test_the_resolved_config_is_kept_and_repeats_the_run(smoke: tuple[Path, str], tmp_path: Path) -> None:
    kept = smoke[0] / "config.yaml"
    assert yaml.safe_load(kept.read_text())["train"]["max_steps"] == 40
    command = ["python", str(ROOT / "job" / "train.py"), "--config", str(kept), "--check", f"run.dir={tmp_path / 'x'}"]
    done = user_runs(command, tmp_path)
    assert done.returncode == 0
    expected = yaml.safe_load(kept.read_text())
    expected["run"]["dir"] = str(tmp_path / "x")
    assert yaml.safe_load(done.stdout) == expected


def test_tensorboard_reads_the_scalars_of_steps_and_evaluation(smoke: tuple[Path, str]) -> None:
    events = EventAccumulator(str(smoke[0] / "tensorboard")).Reload()
    tags = {"train/loss", "train/accuracy", "test/loss", "test/accuracy", "optimizer/learning_rate"}
    by_rank = {
        f"{name}/{r}" for name in ("ranks/compute_seconds", "ranks/wait_seconds", "memory/rss_bytes") for r in (0, 1)
    }
    assert tags | by_rank | {"throughput/images_per_second"} <= set(events.Tags()["scalars"])
    losses = events.Scalars("train/loss")
    assert [event.step for event in losses] == list(range(1, 41))
    logged = [record["loss"] for record in records_of(smoke[0]) if record["split"] == "train"]
    assert [event.value for event in losses] == pytest.approx(logged, rel=1e-6)


def test_rank_0_ends_with_the_result_and_where_it_is_and_others_are_silent(smoke: tuple[Path, str]) -> None:
    lines = [line for line in smoke[1].splitlines() if line.strip()]
    summary = json.loads((smoke[0] / "summary.json").read_text())
    assert f"done: test accuracy {summary['test_accuracy']:.4f}" in lines[-1] and "here/run" in lines[-1]
    assert not [line for line in lines if line.startswith(("[1]", "[1,1]"))]
    assert "\x1b" not in smoke[1]


def test_a_second_run_into_the_same_folder_is_refused_and_nothing_is_lost(smoke: tuple[Path, str]) -> None:
    before = {path: path.read_bytes() for path in smoke[0].rglob("*") if path.is_file()}
    command = ["python", str(ROOT / "job" / "train.py"), *SMOKE, f"run.dir={smoke[0]}"]
    done = user_runs(command, smoke[0])
    assert done.returncode == 2
    assert "already holds a run" in done.stderr and "run.overwrite=true" in done.stderr
    assert {path: path.read_bytes() for path in smoke[0].rglob("*") if path.is_file()} == before


def test_one_rank_without_a_launcher_and_four_with_it_end_with_the_same_bits(tmp_path: Path) -> None:
    train = ["python", str(ROOT / "job" / "train.py"), *SMOKE, "train.max_steps=3"]
    assert user_runs([*train, "run.dir=one"], tmp_path).returncode == 0
    assert user_runs(["horovodrun", "-np", "4", *train, "run.dir=four"], tmp_path).returncode == 0
    one, four = (records_of(tmp_path / name) for name in ("one", "four"))
    assert [record["loss"] for record in four] == [record["loss"] for record in one]
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("one", "four")]
    assert len({summary["weights_sha256"] for summary in summaries}) == 1
    assert [summary["test_examples"] for summary in summaries] == [10000, 10000]


def test_a_quiet_run_prints_nothing_and_leaves_everything(tmp_path: Path) -> None:
    command = ["python", str(ROOT / "job" / "train.py"), "--quiet", *SMOKE, "train.max_steps=2", "run.dir=run"]
    done = user_runs(command, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 2


def test_a_quiet_run_that_fails_says_why(tmp_path: Path) -> None:
    command = ["python", str(ROOT / "job" / "train.py"), "--quiet", *SMOKE, "run.dir=run", "data.dir=nowhere"]
    done = user_runs(command, tmp_path)
    assert (done.returncode, done.stdout) == (1, "") and "nowhere" in done.stderr


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["train.epoch=3"], ["train.epoch", "did you mean train.epochs"]),
        (["--config", "missing.yaml"], ["missing.yaml", "no such config file"]),
        (["data.global_batch=1"], ["2 ranks", "data.global_batch"]),
        (["--epochs", "3"], ["--epochs"]),
    ],
)
def test_the_launch_script_refuses_what_is_wrong_with_one_message_before_any_rank_starts(
    tmp_path: Path, arguments: list[str], words: list[str]
) -> None:
    done = user_runs([str(ROOT / "launch" / "local.sh"), "-np", "2", *arguments], tmp_path)
    assert done.returncode == 2, done.stderr
    assert all(word in done.stderr for word in words), done.stderr
    assert "Traceback" not in done.stderr and done.stdout == "" and not list(tmp_path.iterdir())


def test_the_launch_script_shows_a_table_and_a_bar_on_a_terminal(tmp_path: Path) -> None:
    command = [str(ROOT / "launch" / "local.sh"), "-np", "2", *synthetic.write(tmp_path / "data"), "run.dir=run"]
    ours, theirs = pty.openpty()
    environment = {**of_user(), "TERM": "xterm"}
    process = subprocess.Popen(
        [*command, "train.epochs=2"], cwd=tmp_path, env=environment, stdout=theirs, stderr=subprocess.STDOUT
    )
    os.close(theirs)
    output = b""
    with contextlib.suppress(OSError):  # what Linux answers when the other side has closed
        while chunk := os.read(ours, 4096):
            output += chunk
    os.close(ours)
    assert process.wait(timeout=60) == 0, output.decode()
    shown = re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", output.decode())
    lines = re.split(r"[\r\n]+", shown)
    for start in ("epoch +step  train loss", " +0 +6 ", " +1 +12 "):
        assert sum(bool(re.match(start, line)) for line in lines) == 1, shown
    assert "━" in shown and re.search(r"on 2 ranks\); weights [0-9a-f]{12}; all of it is in run", shown)


def test_under_horovodrun_a_bad_config_is_told_once(tmp_path: Path) -> None:
    command = ["horovodrun", "-np", "3", "python", str(ROOT / "job" / "train.py"), "train.epochs=none"]
    done = user_runs(command, tmp_path)
    output = done.stdout + done.stderr
    assert done.returncode in (1, 2)  # over Gloo horovodrun makes 1 of every exit code, over MPI it passes it on
    assert output.count("train.epochs") == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("launcher", [["--gloo"], []], ids=["gloo", "mpi"])
def test_a_user_whom_the_machine_does_not_know_trains_without_a_home(tmp_path: Path, launcher: list[str]) -> None:
    for folder in (tmp_path, *tmp_path.parents[:2]):  # pytest's own are root's alone
        folder.chmod(0o777)
    # The capability only opens what is root's alone here, such as the folder of this Python.
    caps = ["--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search"]
    stranger = ["setpriv", "--reuid", "12345", "--regid", "12345", "--clear-groups", *caps]
    nobody = ["env", "-u", "HOME", "-u", "USER", "-u", "LOGNAME", f"TMPDIR={tmp_path}"]
    local = [str(ROOT / "launch" / "local.sh"), "-np", "2", *launcher, *synthetic.write(tmp_path / "data")]
    done = user_runs([*stranger, *nobody, *local, "train.max_steps=2", "run.dir=run"], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 2
    assert (tmp_path / "run" / "summary.json").stat().st_uid == 12345


def test_missing_data_is_one_message_that_says_how_to_mend_it(tmp_path: Path) -> None:
    command = ["python", str(ROOT / "job" / "train.py"), *SMOKE, "run.dir=run", "data.dir=nowhere"]
    done = user_runs(command, tmp_path)
    assert done.returncode == 1 and "nowhere" in done.stderr and "Traceback" not in done.stderr
