"""The folder of a run: no run is lost by accident, and no file of somebody else's ever."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from job import run_dir
from job.config import ROOT, Config, RunConfig, load_config
from job.errors import CheckpointError, JobError, UsageError

CONTENTS = ("config.yaml", "metrics.jsonl", "tensorboard", "summary.json", "checkpoints", "profile")


WRITTEN = {
    "config.yaml": "config.yaml",
    "metrics.jsonl": "metrics.jsonl",
    "tensorboard": "tensorboard/events.out.tfevents.1.host",
    "summary.json": "summary.json",
    "checkpoints": "checkpoints/step-00000007/state.json",
    "profile": "profile/steps-2-3.rank0.json",
}


def a_run_in(folder: Path, *names: str) -> None:
    """What a run leaves under these names, beside its lock."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "lock").write_text("process 7 on elsewhere")
    for file in (folder / WRITTEN[name] for name in names):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(Config().to_yaml() if file.name == "config.yaml" else "hours of work")


def contents(folder: Path) -> dict[str, str]:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): file.read_text() for file in files}


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
    a_run_in(tmp_path, name)
    before = contents(tmp_path)
    for refuse in (run_dir.check, run_dir.claim):
        with pytest.raises(UsageError, match=rf"already holds a run \({name}\).*run\.overwrite=true"):
            refuse(config(tmp_path))
    assert contents(tmp_path) == before


@pytest.mark.parametrize("how", [{}, {"resume": "auto"}, {"overwrite": True}], ids=["never", "auto", "overwrite"])
@pytest.mark.parametrize(
    "name",
    [
        "config.yaml", "metrics.jsonl", "summary.json", "tensorboard/events.out.tfevents.1.mine",
        "checkpoints/best.pth", "checkpoints/deep/best.pth", "profile/trace.json", "checkpoints", "lock",
    ],
)  # fmt: skip
def test_what_no_run_has_written_is_refused_by_its_name_and_left_alone(
    tmp_path: Path, name: str, how: dict[str, Any]
) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("mine")
    wanted = Config(run=RunConfig(dir=tmp_path, **how))
    for refuse in (run_dir.check, run_dir.claim):
        with pytest.raises(UsageError, match=rf"holds what no run has written.*{name}.*nothing was removed"):
            refuse(wanted)
    assert contents(tmp_path) == {name: "mine"}


@pytest.mark.parametrize("name", ["checkpoints/best.pth", "checkpoints/step-00000007/best.pth", "tensorboard/notes"])
def test_a_file_amid_a_run_that_the_run_has_not_written_keeps_the_run_from_being_replaced(
    tmp_path: Path, name: str
) -> None:
    a_run_in(tmp_path, *CONTENTS)
    (tmp_path / name).write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(UsageError, match=rf"no run has written.*: {name}; "):
        run_dir.claim(config(tmp_path, overwrite=True))
    assert contents(tmp_path) == before


def test_a_config_by_hand_is_not_replaced_though_a_run_could_go_on_there(tmp_path: Path) -> None:
    a_run_in(tmp_path, "checkpoints")
    (tmp_path / "config.yaml").write_text("# mine\n" + Config().to_yaml())
    with pytest.raises(UsageError, match=r"no run has written.*: config\.yaml; "):
        run_dir.claim(resuming(tmp_path))
    assert (tmp_path / "config.yaml").read_text().startswith("# mine\n")


def test_a_run_of_before_there_were_locks_is_known_by_its_config(tmp_path: Path) -> None:
    a_run_in(tmp_path, *CONTENTS)
    (tmp_path / "lock").unlink()
    run_dir.claim(config(tmp_path, overwrite=True)).close()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.yaml", "lock"]


def test_what_a_real_run_leaves_is_all_known_to_be_a_runs(tmp_path: Path) -> None:
    for name in (
        "metrics.jsonl", "lock", "tensorboard/events.out.tfevents.1795836598.vm.1795836598992198127", "summary.json",
        "tensorboard/00003/penultimate_features/sprite.png", "tensorboard/00003/penultimate_features/metadata.tsv",
        "tensorboard/00003/penultimate_features/tensors.tsv", "tensorboard/projector_config.pbtxt",
        "profile/steps-2-3.rank0.json", "profile/steps-2.horovod.json", "checkpoints/step-00000003/state.json",
        "checkpoints/step-00000003/arrays.params", "checkpoints/step-00000003/manifest.json",
        "checkpoints/step-00000004.partial/arrays.params", "checkpoints/step-00000002.old.partial/manifest.json",
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("process 7 on elsewhere")
    run_dir.claim(config(tmp_path, overwrite=True)).close()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.yaml", "lock"]


def test_the_refusal_names_the_folder_and_all_that_it_holds(tmp_path: Path) -> None:
    a_run_in(tmp_path, "metrics.jsonl", "summary.json")
    with pytest.raises(UsageError) as caught:
        run_dir.check(config(tmp_path))
    assert f"run.dir={tmp_path}" in str(caught.value)
    assert "metrics.jsonl, summary.json" in str(caught.value)


def test_overwriting_removes_the_old_run_and_nothing_else(tmp_path: Path) -> None:
    a_run_in(tmp_path, "metrics.jsonl", "summary.json", "config.yaml", "tensorboard")
    strangers = [tmp_path / "notes.txt", tmp_path / "mine" / "metrics.jsonl"]
    strangers[1].parent.mkdir()
    for stranger in strangers:
        stranger.write_text("mine")

    wanted = config(tmp_path, overwrite=True)
    run_dir.claim(wanted)

    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.yaml", "lock", "mine", "notes.txt"]
    assert [stranger.read_text() for stranger in strangers] == ["mine", "mine"]
    assert load_config(tmp_path / "config.yaml") == wanted


def test_a_link_out_of_the_folder_is_neither_followed_nor_removed(tmp_path: Path) -> None:
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "run"
    elsewhere.mkdir()
    a_run_in(folder)
    (elsewhere / "events").write_text("mine")
    (folder / "tensorboard").symlink_to(elsewhere)
    with pytest.raises(UsageError, match=r"no run has written.*: tensorboard; "):
        run_dir.claim(config(folder, overwrite=True))
    assert (folder / "tensorboard" / "events").read_text() == "mine"


def test_a_link_to_an_empty_folder_stays_for_the_run_to_write_to(tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "scratch")
    run_dir.claim(resuming(tmp_path / "run")).close()
    assert (tmp_path / "run" / "checkpoints").is_symlink()


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
    a_run_in(tmp_path, "metrics.jsonl", "summary.json", "checkpoints")
    run_dir.claim(resuming(tmp_path)).close()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["checkpoints", "config.yaml", "lock", "metrics.jsonl"]


def test_a_run_that_died_before_it_had_anything_to_lose_starts_anew(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "tensorboard").mkdir()
    run_dir.claim(resuming(tmp_path)).close()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.yaml", "lock"]


def test_a_run_whose_checkpoints_are_gone_is_never_started_anew(tmp_path: Path) -> None:
    a_run_in(tmp_path, "metrics.jsonl")
    for refuse in (run_dir.check, run_dir.claim):
        with pytest.raises(CheckpointError, match=r"none of its checkpoints.*run\.overwrite=true"):
            refuse(resuming(tmp_path))
    assert (tmp_path / "metrics.jsonl").read_text() == "hours of work"


def test_a_checkpoint_of_another_run_is_no_reason_to_go_on_in_a_folder_that_holds_one(tmp_path: Path) -> None:
    a_run_in(tmp_path / "run", "checkpoints")
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


def test_whoever_takes_over_waits_for_a_folder_in_use(tmp_path: Path) -> None:
    lock = run_dir.claim(config(tmp_path))
    run_dir.wait_until_free(config(tmp_path).run.dir, patience_seconds=0.2)
    with pytest.raises(UsageError, match="in use by process"):
        run_dir.check(config(tmp_path, overwrite=True))
    soon = threading.Timer(0.3, lock.close)
    soon.start()
    run_dir.wait_until_free(config(tmp_path).run.dir, patience_seconds=60)
    run_dir.check(config(tmp_path, overwrite=True))
    soon.join()


@pytest.mark.parametrize("rest", ["step-00000007.partial", "step-00000007.old.partial"])
def test_a_checkpoint_that_was_never_finished_is_none(tmp_path: Path, rest: str) -> None:
    a_run_in(tmp_path, "metrics.jsonl")
    (tmp_path / "checkpoints" / rest).mkdir(parents=True)
    with pytest.raises(CheckpointError, match="none of its checkpoints"):
        run_dir.check(resuming(tmp_path))


def denied(monkeypatch: pytest.MonkeyPatch, name: str, what: Path) -> None:
    """Have a call of ``os`` refuse a path, as to a user who is not root."""
    real = getattr(os, name)

    def refuse(path: Any, *arguments: Any, **options: Any) -> Any:
        if Path(path) == what:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, name, refuse)


def test_checkpoints_that_cannot_be_looked_at_are_not_taken_for_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_run_in(tmp_path, *CONTENTS)
    denied(monkeypatch, "listdir", tmp_path / "checkpoints")
    with pytest.raises(UsageError, match=r"checkpoints: cannot be used: Permission denied.*permissions"):
        run_dir.claim(resuming(tmp_path))


def test_a_folder_of_another_user_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    denied(monkeypatch, "lstat", tmp_path / "run")
    with pytest.raises(UsageError, match=r"run\.dir=.*run: cannot be used: Permission denied"):
        run_dir.check(config(tmp_path / "run"))


def test_a_name_that_is_too_long_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot be used: File name too long; give another run\.dir"):
        run_dir.check(config(tmp_path / ("x" * 300)))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_a_run_of_another_user_cannot_be_used_and_says_so(tmp_path: Path) -> None:
    """By a process of that other user: here, root may do all."""
    a_run_in(tmp_path / "run", *CONTENTS)
    for path in (tmp_path, *tmp_path.parents):
        if path.stat().st_uid == 0 and path not in (Path("/"), Path("/tmp")):
            path.chmod(0o755)
    program = (
        "import os, sys; from pathlib import Path; from job import run_dir; from job.config import *;"
        "from job.errors import UsageError\n"
        "os.setgid(65534); os.setuid(65534)\n"
        "try: run_dir.check(Config(run=RunConfig(dir=Path(sys.argv[1]), resume='auto')))\n"
        "except UsageError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "run")], cwd=ROOT, capture_output=True, text=True
    )
    assert "lock: cannot be used: Permission denied" in done.stdout, done.stderr
