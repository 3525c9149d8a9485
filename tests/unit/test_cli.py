"""The command line: help that tells all, a dry run, and usage errors before anything starts."""

from __future__ import annotations

import importlib
import os
import pwd
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest
import yaml

import job
from job import cli
from job.config import ROOT, Config, fields, load_config
from job.errors import UsageError


@pytest.fixture(autouse=True)
def alone_in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("HOROVOD_SIZE", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def help_text(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("XDG_CACHE_HOME", "/home/user/.cache")
    with pytest.raises(SystemExit) as left:
        cli.parse(["--help"])
    assert left.value.code == 0
    return capsys.readouterr().out


def on_ranks(monkeypatch: pytest.MonkeyPatch, size: int, rank: int = 0) -> None:
    monkeypatch.setenv("HOROVOD_SIZE", str(size))
    monkeypatch.setenv("HOROVOD_RANK", str(rank))


def test_help_lists_every_key_with_its_description(help_text: str) -> None:
    entries = help_text[help_text.index("keys, with their defaults") :]
    for key, field in fields():
        assert f"\n  {key}=" in entries, key
        after = entries.split(f"\n  {key}=")[1].split("=")[0]  # to the next key
        assert field.description in " ".join(after.split()), key


@pytest.mark.parametrize(
    "assignment",
    [
        "run.dir=runs/fashion_mnist",
        "run.overwrite=false",
        "run.device=auto",
        "train.epochs=5",
        "train.max_steps=null",
        "data.global_batch=256",
        "data.cache_dir=/home/user/.cache/horovod-gluon-job/fashion-mnist",
        "data.sha256.test_labels=0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        "model.sync_batch_norm=true",
        "optimizer.learning_rate=0.2",
        "optimizer.epsilon=1e-08",
        "schedule.step_epochs=[]",
    ],
)
def test_help_shows_the_default(help_text: str, assignment: str) -> None:
    assert f"  {assignment} " in help_text or f"  {assignment}\n" in help_text


def test_help_shows_the_choices_and_the_exit_codes(help_text: str) -> None:
    assert "auto|cpu|gpu" in help_text
    assert "constant|step|cosine" in help_text
    assert "0 done; 1 failed; 2 bad configuration" in help_text
    assert "horovodrun -np 4 python job/train.py" in help_text


def test_help_fits_a_wide_terminal(help_text: str) -> None:
    assert max(map(len, help_text.splitlines())) <= 120


def test_no_arguments_mean_the_default_recipe() -> None:
    assert cli.parse([]) == load_config()


def test_check_prints_a_config_that_reads_back_and_starts_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        cli.parse(["--check", "train.epochs=9", "run.dir=new"])
    printed = capsys.readouterr().out
    assert left.value.code == 0
    assert Config.model_validate(yaml.safe_load(printed)) == load_config(None, ["train.epochs=9", "run.dir=new"])
    assert list(tmp_path.iterdir()) == []


def test_check_prints_the_config_of_a_quiet_run_too(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.parse(["--check", "--quiet", "run.seed=7"])
    assert yaml.safe_load(capsys.readouterr().out)["run"]["seed"] == 7


def test_a_check_does_not_wait_for_the_import_of_what_trains(tmp_path: Path) -> None:
    program = (
        "import runpy, sys\n"
        "try:\n    runpy.run_path('job/train.py', run_name='__main__')\n"
        "finally:\n    print({'mxnet', 'horovod', 'numba', 'numpy', 'tensorboardX'} & {*sys.modules}, file=sys.stderr)"
    )
    command = [sys.executable, "-c", program, "--check", f"run.dir={tmp_path / 'new'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "set()\n")


def test_check_finds_a_bad_value() -> None:
    with pytest.raises(UsageError, match=r"train\.epochs"):
        cli.parse(["--check", "train.epochs=0"])


@pytest.mark.parametrize(
    "arguments",
    [
        ["--config", "own.yaml", "run.seed=3", "train.epochs=9"],
        ["run.seed=3", "train.epochs=9", "--config", "own.yaml"],
        ["run.seed=3", "--config", "own.yaml", "train.epochs=9"],
        ["run.seed=3", "--config=own.yaml", "train.epochs=9"],
    ],
    ids=["after", "before", "around", "with an equals sign"],
)
def test_overrides_may_stand_anywhere(tmp_path: Path, arguments: list[str]) -> None:
    (tmp_path / "own.yaml").write_text("{run: {seed: 1}, data: {global_batch: 100}}")
    config = cli.parse(arguments)
    assert (config.run.seed, config.train.epochs, config.data.global_batch) == (3, 9, 100)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config"], "--config"),
        (["--config", "absent.yaml"], r"absent\.yaml"),
        (["--wrong"], r"--wrong.*--help"),
        (["train.epochs"], r"train\.epochs.*key\.path=value"),
        (["train.epochs=x"], r"train\.epochs"),
    ],
)
def test_wrong_usage_is_a_usage_error(arguments: list[str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        cli.parse(arguments)


def test_more_ranks_than_samples_in_a_batch_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    on_ranks(monkeypatch, 9)
    with pytest.raises(UsageError, match=r"8 samples.*9 ranks.*data\.global_batch"):
        cli.parse(["data.global_batch=8"])


def test_one_sample_for_each_rank_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    on_ranks(monkeypatch, 8)
    assert cli.parse(["data.global_batch=8"]).data.global_batch == 8


def test_micro_batches_need_a_sample_for_each_rank_too(monkeypatch: pytest.MonkeyPatch) -> None:
    on_ranks(monkeypatch, 3)
    assert cli.parse(["data.global_batch=6", "train.accumulate_steps=2"])
    with pytest.raises(UsageError, match=r"5 samples.*3 ranks x 2.*train\.accumulate_steps"):
        cli.parse(["data.global_batch=5", "train.accumulate_steps=2"])


def settled(*overrides: str, ranks: int, smallest: int, tell: bool = True) -> Config:
    config = load_config(None, ["run.dir=run", *overrides])
    config.run.dir.mkdir(exist_ok=True)
    return cli.settle_shards(config, ranks, smallest, tell)


@pytest.mark.parametrize(
    ("asked", "ranks", "smallest", "micros", "shards"),
    [
        (8, 1, 255, 1, 8),
        (8, 8, 255, 1, 8),
        (8, 9, 255, 1, 9),  # a shard for each rank
        (8, 16, 255, 1, 16),
        (8, 2, 5, 1, 5),  # a sample for each shard
        (8, 2, 13, 2, 6),  # in the smallest micro-batch
        (1, 3, 3, 1, 3),
        (300, 2, 255, 1, 255),
    ],
)
def test_shards_are_at_least_the_ranks_and_at_most_the_samples_of_the_smallest_batch(
    asked: int, ranks: int, smallest: int, micros: int, shards: int
) -> None:
    overrides = [f"data.shards={asked}", f"train.accumulate_steps={micros}", "train.epochs=9"]
    config = settled(*overrides, ranks=ranks, smallest=smallest)
    assert config == load_config(None, ["run.dir=run", *overrides, f"data.shards={shards}"])  # and nothing else is new


@pytest.mark.parametrize(
    ("overrides", "ranks", "smallest", "said"),
    [
        ([], 16, 255, "data.shards=16, not 8: 16 ranks need as many"),
        ([], 2, 5, "data.shards=5, not 8: the smallest batch is of 5 samples"),
        (["train.accumulate_steps=2"], 2, 13, "data.shards=6, not 8: the smallest micro-batch is of 6 samples"),
    ],
)
def test_other_shards_than_asked_for_are_said_once_and_written_to_the_runs_configuration(
    capsys: pytest.CaptureFixture[str], overrides: list[str], ranks: int, smallest: int, said: str
) -> None:
    config = settled(*overrides, ranks=ranks, smallest=smallest)
    assert capsys.readouterr().out.splitlines() == [said]
    assert Config.model_validate(yaml.safe_load(Path("run/config.yaml").read_text())) == config
    assert settled(*overrides, ranks=ranks, smallest=smallest, tell=False) == config  # as the other ranks
    assert capsys.readouterr().out == ""


def test_shards_as_asked_for_are_not_worth_a_word_or_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    settled(ranks=4, smallest=255)
    assert capsys.readouterr() == ("", "")
    assert list(Path("run").iterdir()) == []


def test_a_batch_per_rank_is_always_enough_for_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    on_ranks(monkeypatch, 64)
    assert cli.parse(["data.batch_per_rank=1", "data.global_batch=null"]).data.global_batch_of(64) == 64


def test_a_folder_that_holds_a_run_is_refused_before_ranks_start(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "metrics.jsonl").touch()
    with pytest.raises(UsageError, match=r"run\.dir=old.*metrics\.jsonl.*run\.overwrite=true"):
        cli.parse(["run.dir=old"])
    assert cli.parse(["run.dir=old", "run.overwrite=true"]).run.overwrite


def test_only_rank_0_looks_at_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "metrics.jsonl").touch()  # perhaps already this run's, by rank 0
    on_ranks(monkeypatch, 2, rank=1)
    assert cli.parse(["run.dir=old"]).run.dir == Path("old")


def test_a_user_whom_the_machine_does_not_know_and_who_has_no_home_gets_help(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that runs as any uid: the cache's folder is under ~, which then is nowhere."""

    def unknown(uid: int) -> NoReturn:
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.delenv("HOME")
    importlib.reload(job)
    assert Path.home().name == f"home-{os.getuid()}"
