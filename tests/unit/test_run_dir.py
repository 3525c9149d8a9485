"""The folder of a run: no run is lost by accident, and no file of somebody else's ever."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from job import run_dir
from job.config import Config, RunConfig, load_config
from job.errors import CheckpointError, JobError, UsageError

CONTENTS = ("config.yaml", "metrics.jsonl", "tensorboard", "summary.json", "checkpoints", "profile")


def config(folder: Path, overwrite: bool = False) -> Config:
    return Config(run=RunConfig(dir=folder, overwrite=overwrite))


def test_a_new_folder_is_made_with_its_parents_and_holds_the_resolved_config(tmp_path: Path) -> None:
    wanted = config(tmp_path / "a" / "b")
    run_dir.claim(wanted)
    assert sorted(file.name for file in (tmp_path / "a" / "b").iterdir()) == ["config.yaml", "lock"]
    assert load_config(tmp_path / "a" / "b" / "config.yaml") == wanted


def test_checking_makes_nothing(tmp_path: Path) -> None:
    run_dir.check(config(tmp_path / "new"))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_other_things_is_accepted_and_they_stay(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    run_dir.claim(config(tmp_path))
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", CONTENTS)
def test_a_folder_that_holds_any_part_of_a_run_is_refused_and_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("hours of work")
    for refuse in (run_dir.check, run_dir.claim):
        with pytest.raises(UsageError, match=rf"already holds a run \({name}\).*run\.overwrite=true"):
            refuse(config(tmp_path))
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {name: "hours of work"}


def test_the_refusal_names_the_folder_and_all_that_it_holds(tmp_path: Path) -> None:
    for name in ("metrics.jsonl", "summary.json"):
        (tmp_path / name).touch()
    with pytest.raises(UsageError) as caught:
        run_dir.check(config(tmp_path))
    assert f"run.dir={tmp_path}" in str(caught.value)
    assert "metrics.jsonl, summary.json" in str(caught.value)


def test_overwriting_removes_the_old_run_and_nothing_else(tmp_path: Path) -> None:
    for name in ("metrics.jsonl", "summary.json", "config.yaml"):
        (tmp_path / name).write_text("old")
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "tensorboard" / "events.old").touch()
    strangers = [tmp_path / "notes.txt", tmp_path / "mine" / "metrics.jsonl"]
    strangers[1].parent.mkdir()
    for stranger in strangers:
        stranger.write_text("mine")

    wanted = config(tmp_path, overwrite=True)
    run_dir.claim(wanted)

    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.yaml", "lock", "mine", "notes.txt"]
    assert [stranger.read_text() for stranger in strangers] == ["mine", "mine"]
    assert load_config(tmp_path / "config.yaml") == wanted


def test_overwriting_does_not_follow_a_link_out_of_the_folder(tmp_path: Path) -> None:
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "run"
    elsewhere.mkdir()
    folder.mkdir()
    (elsewhere / "events").write_text("mine")
    (folder / "tensorboard").symlink_to(elsewhere)
    run_dir.claim(config(folder, overwrite=True))
    assert not (folder / "tensorboard").exists()
    assert (elsewhere / "events").read_text() == "mine"


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_is_not_a_folder(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match=r"run\.dir=.*file is a file, not a folder"):
        run_dir.check(config(tmp_path / "file", overwrite))
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_under_a_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(JobError, match=r"run\.dir=.*file/run: cannot be written: Not a directory") as caught:
        run_dir.claim(config(tmp_path / "file" / "run"))
    assert caught.value.exit_code == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_in_a_parent_that_is_read_only_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o555)
    with pytest.raises(JobError, match=r"run\.dir=.*locked/run: cannot be written: Permission denied"):
        run_dir.claim(config(tmp_path / "locked" / "run"))


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(JobError, match=r"run\.dir=.*cannot be written: No space left on device"):
        run_dir.claim(config(tmp_path))


def test_the_summary_is_json_and_leaves_no_temporary_file(tmp_path: Path) -> None:
    run_dir.write_summary(tmp_path, {"ranks": 2, "test_accuracy": 0.5})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"ranks": 2, "test_accuracy": 0.5}
    assert [file.name for file in tmp_path.iterdir()] == ["summary.json"]


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_write_that_is_cut_short_leaves_the_old_file_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    def cut(*_: object) -> None:
        raise KeyboardInterrupt

    file = tmp_path / "file"
    run_dir.write_whole(file, "old\n")
    monkeypatch.setattr(os, moment, cut)
    with pytest.raises(KeyboardInterrupt):
        run_dir.write_whole(file, "new\n" * 1000)
    assert file.read_text() == "old\n"


def test_a_file_is_on_the_disk_before_it_takes_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (calls.append("fsync"), fsync(descriptor)))
    monkeypatch.setattr(os, "replace", lambda *paths: (calls.append("replace"), replace(*paths)))
    run_dir.write_whole(tmp_path / "file", "all of it: ü\n")
    assert calls[:2] == ["fsync", "replace"]
    assert (tmp_path / "file").read_bytes() == "all of it: ü\n".encode()


def resuming(folder: Path) -> Config:
    return Config(run=RunConfig(dir=folder, resume="auto"))


def test_a_run_that_is_gone_on_with_keeps_all_but_what_says_that_it_is_complete(tmp_path: Path) -> None:
    for name in ("metrics.jsonl", "summary.json"):
        (tmp_path / name).write_text("{}\n")
    (tmp_path / "checkpoints" / "step-00000007").mkdir(parents=True)
    run_dir.claim(resuming(tmp_path)).close()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["checkpoints", "config.yaml", "lock", "metrics.jsonl"]


def test_a_run_that_died_before_it_had_anything_to_lose_starts_anew(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "tensorboard").mkdir()
    run_dir.claim(resuming(tmp_path)).close()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.yaml", "lock"]


def test_a_run_whose_checkpoints_are_gone_is_never_started_anew(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("hours of work")
    for refuse in (run_dir.check, run_dir.claim):
        with pytest.raises(CheckpointError, match=r"none of its checkpoints.*run\.overwrite=true"):
            refuse(resuming(tmp_path))
    assert (tmp_path / "metrics.jsonl").read_text() == "hours of work"


def test_a_checkpoint_of_another_run_is_no_reason_to_go_on_in_a_folder_that_holds_one(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints" / "step-00000007").mkdir(parents=True)
    elsewhere = Config(run=RunConfig(dir=tmp_path / "run", resume=str(tmp_path / "other" / "step-00000007")))
    with pytest.raises(UsageError, match="already holds a run"):
        run_dir.check(elsewhere)
    run_dir.check(Config(run=RunConfig(dir=tmp_path / "run", resume=str(tmp_path / "run/checkpoints/step-00000007"))))


def test_a_folder_in_use_is_refused_by_the_name_of_who_uses_it_until_it_is_free(tmp_path: Path) -> None:
    lock = run_dir.claim(config(tmp_path))
    for refuse in (run_dir.check, run_dir.claim):
        with pytest.raises(UsageError, match=rf"in use by process {os.getpid()} on "):
            refuse(config(tmp_path, overwrite=True))
    lock.close()
    run_dir.claim(config(tmp_path, overwrite=True)).close()
