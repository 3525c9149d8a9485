"""Checkpoints: whatever is broken, and whenever, the old one or the new one loads, and neither runs code."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mxnet as mx
import numpy as np
import pytest

from job.checkpoints import store as store_module
from job.checkpoints.store import (
    FORMAT,
    BackgroundWriter,
    Damaged,
    Store,
    decode_arrays,
    decode_state,
    encode_arrays,
    read,
    weights_sha256,
)
from job.errors import CheckpointError

ROOT = Path(__file__).resolve().parents[3]
ARRAYS = {"network/0.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "optimizer/0": np.array([1e-300, np.pi])}
VALUES = {"progress": {"steps": 7}, "half": 0.1, "text": "ü"}


def fill(folder: Path, steps: int = 3, keep: int = 10) -> Store:
    store = Store(folder, keep)
    for step in range(1, steps + 1):
        store.write(step, {name: array + step for name, array in ARRAYS.items()}, {**VALUES, "step": step})
    return store


def no_warning(message: str) -> None:
    raise AssertionError(message)


def names(store: Store) -> list[str]:
    return sorted(path.name for path in store.folder.iterdir())


def test_what_was_written_is_read_back_to_the_last_bit(tmp_path: Path) -> None:
    found = fill(tmp_path).newest(no_warning)
    assert found is not None and found.step == 3
    assert json.loads(found.state) == {**VALUES, "step": 3}
    arrays = decode_arrays(found.arrays)
    assert list(arrays) == list(ARRAYS)
    for name, array in ARRAYS.items():
        assert arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(arrays[name], array + 3)


def test_numbers_that_json_does_not_know_are_kept_in_json_that_any_reader_takes(tmp_path: Path) -> None:
    values = {"loss": [float("nan"), float("inf"), -float("inf"), 0.5], "float": "nan", "held": {"a": {"float": 1}}}
    Store(tmp_path, 3).write(1, ARRAYS, values, score=float("nan"))
    found = Store(tmp_path, 3).newest(no_warning)
    assert found is not None

    def refuse(word: str) -> None:
        raise AssertionError(word)

    for file in ("state.json", "manifest.json"):
        json.loads((tmp_path / "step-00000001" / file).read_text(), parse_constant=refuse)
    assert repr(decode_state(found.state)) == repr(values)


def test_the_bare_words_of_earlier_versions_are_read() -> None:
    assert repr(decode_state(b'{"loss": [NaN, -Infinity]}')) == "{'loss': [nan, -inf]}"


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "uint8", "int8", "int32", "int64"])
def test_arrays_are_in_mxnets_own_format_both_ways(tmp_path: Path, dtype: str) -> None:
    arrays = {"a": np.arange(24).reshape(2, 3, 4).astype(dtype), "ü/b": np.array([7]).astype(dtype)}
    (tmp_path / "ours.params").write_bytes(encode_arrays(arrays))
    theirs = mx.nd.load(str(tmp_path / "ours.params"))
    mx.nd.save(str(tmp_path / "theirs.params"), {name: mx.nd.array(a, dtype=dtype) for name, a in arrays.items()})
    ours = decode_arrays((tmp_path / "theirs.params").read_bytes())
    for name, array in arrays.items():
        assert theirs[name].dtype == array.dtype
        np.testing.assert_array_equal(theirs[name].asnumpy(), array)
        np.testing.assert_array_equal(ours[name], array)
    assert (tmp_path / "ours.params").read_bytes() == (tmp_path / "theirs.params").read_bytes()


def test_an_empty_folder_or_none_holds_no_checkpoint(tmp_path: Path) -> None:
    assert Store(tmp_path, 1).newest(no_warning) is None
    assert Store(tmp_path / "absent", 1).newest(no_warning) is None


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x04
    file.write_bytes(bytes(content))


def empty(file: Path) -> None:
    file.write_bytes(b"")


def prolong(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0")


def make_a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


DAMAGES = [truncate, flip_a_bit, empty, prolong, Path.unlink, make_a_folder]


@pytest.mark.fault(8)
@pytest.mark.parametrize("name", ["arrays.params", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damage_to_any_file_is_found_told_and_the_one_before_used(
    tmp_path: Path, damage: Callable[[Path], None], name: str
) -> None:
    store, warnings = fill(tmp_path), []
    damage(tmp_path / "step-00000003" / name)
    found = store.newest(warnings.append)
    assert found is not None and found.step == 2
    assert len(warnings) == 1
    assert str(tmp_path / "step-00000003" / name) in warnings[0]


@pytest.mark.fault(8)
def test_every_single_bit_of_a_manifest_counts(tmp_path: Path) -> None:
    store = fill(tmp_path, steps=1)
    file = tmp_path / "step-00000001" / "manifest.json"
    whole = file.read_bytes()
    meant = json.loads(whole)
    for bit in range(len(whole) * 8):
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        file.write_bytes(bytes(content))
        try:
            if json.loads(content) == meant:  # in white space
                continue
        except ValueError:
            pass
        with pytest.raises(CheckpointError, match="none of its 1 checkpoints is intact"):
            store.newest(lambda message: None)


@pytest.mark.fault(8)
def test_if_all_are_damaged_it_is_an_error_and_nothing_is_removed(tmp_path: Path) -> None:
    store, warnings = fill(tmp_path), []
    for path in store.paths():
        flip_a_bit(path / "state.json")
    with pytest.raises(CheckpointError, match="none of its 3 checkpoints is intact"):
        store.newest(warnings.append)
    assert len(warnings) == 3
    assert len(names(store)) == 3


def written_as(folder: Path, monkeypatch: pytest.MonkeyPatch, number: int, step: int) -> None:
    """Write a checkpoint as a program of another format does."""
    monkeypatch.setattr(store_module, "FORMAT", number)
    Store(folder, 5).write(step, ARRAYS, VALUES)
    monkeypatch.undo()


@pytest.mark.fault(10)
def test_a_newer_format_is_refused_and_not_taken_for_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = fill(tmp_path, steps=1)
    written_as(tmp_path, monkeypatch, FORMAT + 1, step=2)
    with pytest.raises(CheckpointError, match=r"step-00000002: is of format 3, this program knows formats up to 2"):
        store.newest(no_warning)


@pytest.mark.fault(10)
def test_the_format_of_runs_without_shards_is_refused_and_not_taken_for_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = fill(tmp_path, steps=1)
    written_as(tmp_path, monkeypatch, 1, step=2)
    with pytest.raises(CheckpointError, match=r"step-00000002: was written by an earlier version.*another run\.dir"):
        store.newest(no_warning)
    assert names(store) == ["step-00000001", "step-00000002"]  # for whoever has that version


WEIGHTS = {
    "4.weight": np.arange(6, dtype=np.float32).reshape(3, 2),
    "10.gamma": np.array([-0.0, 1.5]),
    "3.running_var": np.array([7.0], np.float32),
}


def by_hand(weights: dict[str, np.ndarray]) -> str:
    """The definition, spelled out: a line for each array in the order of names, and its numbers."""
    content = b"10.gamma float64 2\n" + struct.pack("<2d", *weights["10.gamma"])
    content += b"3.running_var float32 1\n" + struct.pack("<f", *weights["3.running_var"])
    content += b"4.weight float32 3x2\n" + struct.pack("<6f", *weights["4.weight"].ravel())
    return hashlib.sha256(content).hexdigest()


def test_the_hash_of_weights_is_that_of_its_documented_definition() -> None:
    assert weights_sha256(WEIGHTS) == by_hand(WEIGHTS)
    assert weights_sha256({}) == hashlib.sha256().hexdigest()


def test_the_hash_of_weights_is_of_numbers_whatever_their_order_in_memory() -> None:
    swapped = {name: array.astype(array.dtype.newbyteorder(">")) for name, array in reversed(WEIGHTS.items())}
    columns = {name: np.asfortranarray(array) for name, array in WEIGHTS.items()}
    assert weights_sha256(swapped) == weights_sha256(columns) == weights_sha256(WEIGHTS)


@pytest.mark.parametrize(
    "change",
    [
        {"10.gamma": np.array([0.0, 1.5])},  # not -0
        {"10.gamma": np.array([-0.0, np.nextafter(1.5, 2)])},
        {"10.gamma": np.array([-0.0, 1.5], np.float32)},
        {"4.weight": np.arange(6, dtype=np.float32).reshape(2, 3)},
        {"4.beta": np.zeros(1)},
    ],
    ids=["a sign", "the last bit", "the type", "the shape", "one more"],
)
def test_the_hash_of_weights_is_another_for_any_other_bit_shape_or_type(change: dict[str, np.ndarray]) -> None:
    assert weights_sha256({**WEIGHTS, **change}) != weights_sha256(WEIGHTS)


def test_a_manifest_holds_the_hash_of_the_weights_and_of_nothing_else(tmp_path: Path) -> None:
    arrays = {f"network/{name}": array for name, array in WEIGHTS.items()}
    for step in (1, 2):  # with another optimizer, but the same weights
        Store(tmp_path, 5).write(step, {**arrays, "optimizer/4.weight.0": np.full(3, step)}, {"step": step})
        manifest = json.loads((tmp_path / f"step-{step:08d}" / "manifest.json").read_text())
        assert manifest["weights_sha256"] == by_hand(WEIGHTS)


class Bomb:
    """Unpickled, it leaves a file behind."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return (open, (str(self.file), "w"))


@pytest.mark.fault(14)
@pytest.mark.parametrize("name", ["arrays.params", "state.json", "manifest.json"])
@pytest.mark.parametrize("signed", [False, True], ids=["as it is", "with a manifest that vouches for it"])
def test_a_pickle_offered_as_a_checkpoint_is_never_executed(tmp_path: Path, name: str, signed: bool) -> None:
    store, exploded = fill(tmp_path / "checkpoints", steps=1), tmp_path / "exploded"
    bomb = pickle.dumps(Bomb(exploded))
    pickle.loads(bomb).close()
    assert exploded.exists()  # it would
    exploded.unlink()

    folder = store.paths()[0]
    (folder / name).write_bytes(bomb)
    if signed and name != "manifest.json":
        files = {file: (folder / file).read_bytes() for file in ("arrays.params", "state.json")}
        (folder / "manifest.json").write_bytes(store_module._manifest(1, None, files, ""))
    with pytest.raises((CheckpointError, mx.MXNetError, ValueError)):
        found = store.newest(lambda message: None)
        assert found is not None
        decode_arrays(found.arrays), json.loads(found.state)
    assert not exploded.exists()


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    store = Store(tmp_path, keep=2)
    for step, score in enumerate([0.5, 0.9, None, 0.9, 0.7, None], start=1):
        store.write(step, ARRAYS, VALUES, score)
    assert names(store) == ["step-00000002", "step-00000005", "step-00000006"]


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    store = Store(tmp_path, keep=2)
    for step in (99_999_999, 100_000_000, 100_000_001):
        store.write(step, ARRAYS, VALUES)
    assert [path.name for path in store.paths()] == ["step-100000001", "step-100000000"]


def test_what_dead_writers_left_and_what_comes_again_is_removed_and_nothing_else(tmp_path: Path) -> None:
    store = fill(tmp_path, steps=3)
    (tmp_path / "step-00000004.partial").mkdir()
    (tmp_path / "step-00000001.old.partial").mkdir()
    (tmp_path / "notes.txt").touch()
    store.tidy(last_step=2)
    assert names(store) == ["notes.txt", "step-00000001", "step-00000002"]


# Dies by SIGKILL at the given moment, of all those before and after a call that touches the disk, or amid a write.
KILLER = """
import io, os, signal, sys, types
from pathlib import Path
sys.path.insert(0, sys.argv[1])
sys.modules["mxnet"] = types.ModuleType("mxnet")  # takes seconds to import, and has no part in writing
import numpy as np
from job.checkpoints import store

left = int(sys.argv[3])
counting = False

def moment():
    global left
    if counting:
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

def watched(function):
    def call(*arguments, **options):
        moment()
        result = function(*arguments, **options)
        moment()
        return result
    return call

class Raw(io.FileIO):
    def write(self, content):
        moment()
        half = len(content) // 2
        if half:
            super().write(content[:half])
            moment()
        return half + super().write(content[half:])

for name in ("mkdir", "fsync", "rename", "replace", "rmdir", "unlink"):
    setattr(os, name, watched(getattr(os, name)))
store.open = watched(lambda file, mode, buffering: Raw(file, mode))
store = store.Store(Path(sys.argv[2]), 1)
counting = True
store.write(2, {"a": np.full(1000, 2.0)}, {"step": 2})
print(left)
"""


def write_and_die(folder: Path, moment: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", KILLER, str(ROOT), str(folder), str(moment)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.fault(7)
def test_a_writer_killed_at_any_moment_leaves_the_old_checkpoint_or_the_new(tmp_path: Path) -> None:
    def prepare(name: str) -> Path:
        Store(tmp_path / name, 1).write(1, {"a": np.full(1000, 1.0)}, {"step": 1})
        return tmp_path / name

    whole = write_and_die(prepare("whole"), 1_000_000)
    moments = 1_000_000 - int(whole.stdout)
    assert moments >= 30
    outcomes = []
    for moment in range(1, moments + 1, max(1, moments // 40)):
        folder = prepare(str(moment))
        died = write_and_die(folder, moment)
        assert died.returncode == -signal.SIGKILL, died.stderr
        store = Store(folder, 1)
        found = store.newest(no_warning)
        assert found is not None
        assert json.loads(found.state) == {"step": found.step}
        np.testing.assert_array_equal(decode_arrays(found.arrays)["a"], np.full(1000, float(found.step)))
        outcomes.append(found.step)
        store.tidy(found.step)
        store.write(2, {"a": np.zeros(1)}, {})
        assert names(store) == ["step-00000002"]
    assert set(outcomes) == {1, 2}
    assert sorted(outcomes) == outcomes


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.fault(9)
def test_a_full_disk_leaves_the_last_good_checkpoint_and_nothing_else(small_disk: Path) -> None:
    store = fill(small_disk, steps=1)
    with pytest.raises(OSError, match="No space left on device"):
        store.write(2, {"large": np.zeros(1 << 18)}, {})
    assert names(store) == ["step-00000001"]
    assert read(store.paths()[0]).step == 1
    store.write(3, ARRAYS, VALUES)  # and once there is space again, it goes on


@pytest.mark.fault(9)
def test_a_disk_that_has_become_read_only_leaves_the_last_good_checkpoint(small_disk: Path) -> None:
    store = fill(small_disk, steps=1)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(OSError, match="Read-only file system"):
        store.write(2, ARRAYS, VALUES)
    assert names(store) == ["step-00000001"]
    assert read(store.paths()[0]).step == 1


ERRORS = {"mkdir": 13, "fsync": 5, "rename": 13}


@pytest.mark.fault(9)
@pytest.mark.parametrize("call", list(ERRORS))
def test_a_call_that_fails_leaves_the_last_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise OSError(ERRORS[call], os.strerror(ERRORS[call]))

    store = fill(tmp_path, steps=1)
    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match=os.strerror(ERRORS[call])):
        store.write(2, ARRAYS, VALUES)
    monkeypatch.undo()
    assert names(store) == ["step-00000001"]


def test_a_file_is_on_the_disk_before_the_checkpoint_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fsync, rename = os.fsync, os.rename

    def noted_fsync(descriptor: int) -> None:
        calls.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def noted_rename(*paths: Any, **options: Any) -> None:
        calls.append("rename")
        rename(*paths, **options)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "rename", noted_rename)
    fill(tmp_path / "checkpoints", steps=1)
    assert calls == [
        "arrays.params", "state.json", "manifest.json", "step-00000001.partial", "rename", "checkpoints",
    ]  # fmt: skip


class GatedStore(Store):
    """Writes when the test lets it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, 10)
        self.gate, self.writing, self.most = threading.Semaphore(0), 0, 0

    def write(self, *arguments: Any) -> None:
        self.writing += 1
        self.most = max(self.most, self.writing)
        assert self.gate.acquire(timeout=20)
        super().write(*arguments)
        self.writing -= 1


def test_writing_does_not_keep_the_caller_and_only_one_write_is_in_flight(tmp_path: Path) -> None:
    store = GatedStore(tmp_path)
    writer = BackgroundWriter(store)
    writer.write(1, ARRAYS, VALUES, None)  # returns, though the gate is shut
    assert store.paths() == []
    store.gate.release()
    store.gate.release()
    writer.write(2, ARRAYS, VALUES, None)
    writer.wait()
    assert [path.name for path in store.paths()] == ["step-00000002", "step-00000001"]
    assert store.most == 1
    writer.close()


def test_a_write_that_failed_is_told_and_nothing_is_written_after_it(tmp_path: Path) -> None:
    store = fill(tmp_path, steps=1)
    writer = BackgroundWriter(store)
    assert writer.failure == ""
    shutil.rmtree(tmp_path)
    tmp_path.write_text("a file where the folder was")
    writer.write(2, ARRAYS, VALUES)
    writer.wait()
    assert str(tmp_path) in writer.failure
    assert "cannot write a checkpoint" in writer.failure
    tmp_path.unlink()
    writer.write(3, ARRAYS, VALUES)
    writer.wait()
    assert not tmp_path.exists()
    writer.close()


@pytest.mark.parametrize("call", ["rename", "rmtree"])
def test_an_old_checkpoint_that_cannot_be_removed_stays_and_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], call: str
) -> None:
    def busy(path: Any, *arguments: Any, **options: Any) -> Any:
        if str(path).endswith(("step-00000001", "step-00000001.old.partial")):
            raise OSError(errno.EBUSY, "Device or resource busy")
        return real(path, *arguments, **options)

    where = os if call == "rename" else shutil
    real = getattr(where, call)
    monkeypatch.setattr(where, call, busy)
    writer = BackgroundWriter(Store(tmp_path, keep=1))
    for step in (1, 2, 3):
        writer.write(step, ARRAYS, VALUES)
        writer.wait()
    assert writer.failure == ""
    assert Store(tmp_path, 1).paths()[0].name == "step-00000003"
    assert capsys.readouterr().err.count("cannot remove it: Device or resource busy; it stays") == 1
    Store(tmp_path, 1).tidy(last_step=3)  # a restart meets it as well
    writer.close()


def test_closing_finishes_what_is_being_written(tmp_path: Path) -> None:
    writer = BackgroundWriter(Store(tmp_path, 1))
    writer.write(1, ARRAYS, VALUES)
    writer.close()
    assert read(tmp_path / "step-00000001").step == 1


def test_a_folder_that_is_no_checkpoint_is_damaged(tmp_path: Path) -> None:
    with pytest.raises(Damaged, match=r"manifest\.json: cannot be read"):
        read(tmp_path)
    with pytest.raises(Damaged, match=r"manifest\.json: cannot be read"):
        read(tmp_path / "absent")
