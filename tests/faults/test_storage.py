"""Disks that fill up, checkpoints that rot or are another run's, and directories that two runs want: rows 8 to 14."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests import synthetic
from tests.faults.conftest import Run, finish, wait_for_line
from tests.unit.checkpoints.test_store import Bomb


@pytest.fixture
def finished(run: Run, whole: Run) -> Run:
    """A run of its own that is a copy of the finished one."""
    shutil.copytree(whole.folder, run.folder)
    shutil.rmtree(run.data[0].partition("=")[2])
    shutil.copytree(whole.data[0].partition("=")[2], run.data[0].partition("=")[2])
    return run


def cut_short(run: Run) -> None:
    """As if the run had been killed after its step 17: checkpoints 6 (the first best), 12 or 15 and 10 are older."""
    shutil.rmtree(run.folder / "checkpoints" / "step-00000018")
    (run.folder / "summary.json").unlink()


@pytest.mark.fault(8)
@pytest.mark.parametrize("file", ["arrays.params", "state.json", "manifest.json"])
def test_a_damaged_checkpoint_is_told_and_the_one_before_used(finished: Run, whole: Run, file: str) -> None:
    newest = finished.folder / "checkpoints" / "step-00000018" / file
    newest.write_bytes(newest.read_bytes()[:-3])
    before = finished.checkpoints()[-2]
    ended = finished.train(1, "run.resume=auto", "run.resume_ignoring=[]")
    assert ended.code == 0, ended.output
    assert f"warning: {newest}: damaged" in ended.output
    assert f"going on after step {int(before[5:])}" in ended.output
    assert finished.weights() == whole.weights()
    assert finished.records() == whole.records()


@pytest.mark.fault(8)
def test_if_all_are_damaged_no_fresh_start_is_made(finished: Run) -> None:
    for name in finished.checkpoints():
        (finished.folder / "checkpoints" / name / "state.json").write_bytes(b"")
    before = (finished.folder / "metrics.jsonl").read_bytes()
    ended = finished.train(1, "run.resume=auto")
    assert ended.code == 1
    assert "checkpoints is intact" in ended.output
    assert (finished.folder / "metrics.jsonl").read_bytes() == before


@pytest.mark.fault(8)
def test_if_all_are_gone_no_fresh_start_is_made(finished: Run) -> None:
    shutil.rmtree(finished.folder / "checkpoints")
    ended = finished.train(1, "run.resume=auto")
    assert ended.code == 1
    assert "holds a run, but none of its checkpoints" in ended.output
    assert finished.records()


@pytest.fixture
def on_a_small_disk(run: Run) -> Iterator[Run]:
    run.folder.mkdir()
    disk = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(run.folder)]
    if subprocess.run(disk, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        yield run
    finally:
        subprocess.run(["umount", "-l", str(run.folder)], check=True)


@pytest.mark.fault(9)
def test_a_full_disk_ends_all_ranks_with_the_reason_and_keeps_the_last_good_one(on_a_small_disk: Run) -> None:
    run = on_a_small_disk
    ended = run.train(2, "checkpoint.keep=50", "checkpoint.every_steps=1", "train.log_every_steps=1000")
    assert ended.code == 1
    said = [line for line in ended.output.splitlines() if "cannot write a checkpoint: No space left on device" in line]
    assert {rank for rank in (0, 1) for line in said if f"rank {rank}:" in line} == {0, 1}, ended.output
    assert not any(name.endswith(".partial") for name in run.checkpoints())
    run.assert_nothing_left()
    newest = run.checkpoints()[-1]
    shutil.rmtree(run.folder / "checkpoints" / run.checkpoints()[0])
    again = run.train(1, "run.resume=auto", "train.max_steps=1", "checkpoint.keep=1")
    assert f"step {int(newest[5:])}" in again.output


@pytest.mark.fault(9)
def test_a_disk_too_full_for_a_record_ends_the_run_with_the_reason_and_it_goes_on_later(
    on_a_small_disk: Run, whole: Run
) -> None:
    run = on_a_small_disk
    command = run.script(2, "checkpoint.every_steps=null")  # none after step 6, so that a record is what meets the end
    process = run.popen(command)
    output = wait_for_line(process, "step 8/")
    filler = run.folder / "filler"
    with pytest.raises(OSError), open(filler, "wb", buffering=0) as stream:
        while True:
            stream.write(bytes(4096))
    ended = finish(process)
    assert ended.code == 1, output + ended.output
    assert "error: rank 0: " in ended.output and "No space left on device; the last" in ended.output
    assert "Traceback" not in ended.output
    run.assert_nothing_left()
    filler.unlink()
    subprocess.run(["mount", "-o", "remount,size=16m", str(run.folder)], check=True)
    again = finish(run.popen(command))
    assert again.code == 0, again.output
    assert run.weights() == whole.weights()
    assert run.records() == whole.records()


@pytest.mark.fault(10)
@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("model.dense_batch_norm=true", "model.dense_batch_norm: False there, True now"),
        ("optimizer.learning_rate=0.1", "optimizer.learning_rate: 0.05 there, 0.1 now"),
        ("data.global_batch=50", "data.global_batch: 100 there, 50 now"),
        ("run.seed=1", "run.seed: 0 there, 1 now"),
    ],
)
def test_another_run_is_refused_with_the_difference(finished: Run, override: str, named: str) -> None:
    before = (finished.folder / "config.yaml").read_bytes()
    ended = finished.train(1, "run.resume=auto", override)
    assert ended.code == 2
    assert named in ended.output
    assert len([line for line in ended.output.splitlines() if " there, " in line]) == 1
    assert (finished.folder / "config.yaml").read_bytes() == before


@pytest.mark.fault(10)
def test_other_data_under_the_same_name_is_refused(finished: Run) -> None:
    synthetic.write(Path(finished.data[0].partition("=")[2]), seed=1)
    ended = finished.train(1, "run.resume=auto")
    assert ended.code == 2
    for key in ("train_images", "train_labels", "test_images", "test_labels"):
        assert f"data.sha256.{key}:" in ended.output


@pytest.mark.fault(10)
def test_a_difference_that_the_user_allows_is_no_obstacle(finished: Run) -> None:
    cut_short(finished)
    ended = finished.train(
        1, "run.resume=auto", "optimizer.learning_rate=0.1", "run.resume_ignoring=[optimizer.learning_rate]"
    )
    assert ended.code == 0, ended.output
    assert finished.records()[-2]["learning_rate"] == 0.1


@pytest.mark.fault(10)
def test_a_newer_format_is_refused_and_not_passed_over(finished: Run) -> None:
    from job.checkpoints.store import _sha256_of

    file = finished.folder / "checkpoints" / "step-00000018" / "manifest.json"
    manifest = {**json.loads(file.read_text()), "format": 99}
    del manifest["sha256"]
    file.write_text(json.dumps({**manifest, "sha256": _sha256_of(manifest)}))
    ended = finished.train(1, "run.resume=auto")
    assert ended.code == 1
    assert "is of format 99" in ended.output


@pytest.mark.fault(11)
def test_a_second_run_in_a_directory_is_refused_and_the_first_goes_on(run: Run) -> None:
    first = run.start(1, "train.epochs=1000")
    wait_for_line(first, "step 1/")
    holder = f"process {first.pid} on {os.uname().nodename}"
    for override in ("run.resume=auto", "run.overwrite=true"):
        second = run.train(1, override)
        assert second.code == 2
        assert f"is in use by {holder}" in second.output
    script = finish(run.popen(run.script(2)))
    assert script.code == 2
    assert holder in script.output
    wait_for_line(first, "step 13/")
    first.kill()
    finish(first)
    assert run.train(1, "run.resume=auto").code == 0  # the lock of a dead process is no obstacle


@pytest.mark.fault(12)
def test_no_step_is_repeated_in_the_metrics_or_in_tensorboard(run: Run, whole: Run) -> None:
    for step in (9, 14):
        assert run.train(2, "run.resume=auto", fault=f"kill:step:0:{step}").code == 1
        with open(run.folder / "metrics.jsonl", "a") as stream:
            stream.write('{"step": 17, "epo')  # as a writer killed amid a line leaves it
    assert run.train(3, "run.resume=auto").code == 0
    assert run.weights() == whole.weights()
    assert run.records() == whole.records()
    shown = EventAccumulator(str(run.folder / "tensorboard"))
    shown.Reload()
    assert [event.step for event in shown.Scalars("train/loss")] == list(range(1, 19))
    assert [event.step for event in shown.Scalars("test/accuracy")] == [6, 12, 18]
    for event, record in zip(shown.Scalars("train/loss"), [r for r in run.records() if r["split"] == "train"]):
        assert event.value == pytest.approx(record["loss"], rel=1e-6)


@pytest.mark.fault(14)
def test_a_pickle_in_the_place_of_a_checkpoint_is_never_executed(finished: Run, tmp_path: Path) -> None:
    bomb = pickle.dumps(Bomb(tmp_path / "exploded"))
    for name in finished.checkpoints():
        for file in (finished.folder / "checkpoints" / name).iterdir():
            file.write_bytes(bomb)
    assert finished.train(1, "run.resume=auto").code == 1
    assert not (tmp_path / "exploded").exists()


@pytest.mark.fault(10)
def test_a_named_checkpoint_starts_another_run_where_it_is(finished: Run, whole: Run, tmp_path: Path) -> None:
    other = Run(tmp_path / "other")
    shutil.rmtree(other.data[0].partition("=")[2])
    shutil.copytree(finished.data[0].partition("=")[2], other.data[0].partition("=")[2])
    named = finished.folder / "checkpoints" / finished.checkpoints()[-2]
    ended = other.train(2, f"run.resume={named}")
    assert ended.code == 0, ended.output
    assert other.weights() == whole.weights()
    first = int(named.name[5:])
    assert other.records() == [record for record in whole.records() if record["step"] > first]
    third = Run(tmp_path / "third").train(1, f"run.resume={tmp_path}")
    assert third.code == 1
    assert "run.resume: no checkpoint that can be gone on from" in third.output
