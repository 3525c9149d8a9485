"""What is kept of a large folder: made once, mapped after that, and never taken for another state of the folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from job.config import DataConfig
from job.data import cache, folder, index, record
from job.data.index import Index, Stamp, kept, stamp
from tests import synthetic


@pytest.fixture(autouse=True)
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was written a moment ago would not be trusted to stay as it is."""
    monkeypatch.setattr(index, "SETTLED_SECONDS", -1.0)


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    synthetic.write_pictures(tmp_path / "data", train=12, test=6)
    return DataConfig(dir=tmp_path / "data", cache_dir=tmp_path / "cache")


def say(line: str) -> None:
    pytest.fail(line)


def names(config: DataConfig) -> list[str]:
    found = folder.find(config, say)
    return [found.train.name(place) for place in range(len(found.train.labels))]


def forbid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "_listed", lambda *_: pytest.fail("listed again"))


def test_the_second_start_maps_what_the_first_has_listed(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    first, digests = names(config), folder.find(config, say).digests
    forbid(monkeypatch)
    assert names(config) == first == sorted(first) and len(first) == 12
    found = folder.find(config, say)
    assert found.digests == digests
    assert isinstance(found.train.labels, np.memmap) and not found.train.labels.flags.writeable


CHANGES: dict[str, Callable[[Path], Any]] = {
    "a picture more": lambda top: shutil.copy(top / "train/red/00002.png", top / "train/red/new.png"),
    "a picture less": lambda top: (top / "test/red/00002.png").unlink(),
    "another name": lambda top: (top / "train/red/00002.png").rename(top / "train/red/2.png"),
    "another class": lambda top: shutil.copytree(top / "train/red", top / "train/pink"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_folder_that_has_changed_is_listed_anew(change: str, config: DataConfig, tmp_path: Path) -> None:
    before = folder.find(config, say).digests
    CHANGES[change](tmp_path / "data")
    for number, path in enumerate((tmp_path / "data").rglob("*")):  # a clock may be too coarse to show it
        if path.is_dir():
            os.utime(path, ns=(number, number))
    assert folder.find(config, say).digests != before


def test_what_has_just_changed_is_listed_and_not_kept(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "SETTLED_SECONDS", 3600.0)
    names(config)
    assert not config.cache_dir.exists()


def test_where_nothing_can_be_kept_each_start_lists_and_says_so(config: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    said: list[str] = []
    assert len(folder.find(config, said.append).train.labels) == 12
    assert len(said) == 1 and "nothing that is found out now is kept" in said[0] and "data.cache_dir" in said[0]


@pytest.mark.parametrize("damage", ["", "{", '{"arrays": ["no such"], "facts": {}}'])
def test_an_index_that_is_damaged_is_made_anew(config: DataConfig, damage: str) -> None:
    first = names(config)
    (about,) = (config.cache_dir / "index").glob("*/about.json")
    about.write_text(damage)
    assert names(config) == first
    (array,) = (config.cache_dir / "index").glob("*/train_names.npy")
    os.truncate(array, 130)
    assert names(config) == first
    assert not list(config.cache_dir.glob(f"{cache.SCRATCH}*"))


def test_the_old_index_of_a_folder_goes_when_another_is_written(config: DataConfig) -> None:
    def write(of: str, state: str) -> Path:
        kept(config, Stamp(of, state), lambda: Index({"numbers": np.arange(3)}, {}), say)
        return max((config.cache_dir / "index").iterdir(), key=lambda path: path.stat().st_ctime_ns)

    old, recent, other = write("a", "1"), write("a", "2"), write("b", "1")
    for path in (old, other):
        os.utime(path, (0, 0))
    new = write("a", "3")
    assert {*(config.cache_dir / "index").iterdir()} == {recent, other, new}


def test_records_are_read_once_and_anew_if_their_file_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synthetic.write_records(tmp_path / "records", train=12, test=6)
    config = DataConfig(dir=tmp_path / "records", cache_dir=tmp_path / "cache")
    first = record.find(config, say)
    whole = record._read
    monkeypatch.setattr(record, "_read", lambda *_: pytest.fail("read again"))
    again = record.find(config, say)
    assert again.digests == first.digests and again.train.labels.tolist() == first.train.labels.tolist()
    monkeypatch.setattr(record, "_read", whole)
    synthetic.write_records(tmp_path / "records", train=9, test=6)
    assert record.find(config, say).digests["train_images"] != first.digests["train_images"]


def test_a_stamp_is_of_names_and_of_when_they_changed(tmp_path: Path) -> None:
    os.utime(tmp_path, ns=(5, 5))
    first = stamp(tmp_path, [tmp_path])
    os.utime(tmp_path, ns=(6, 6))
    second = stamp(tmp_path, [tmp_path])
    assert first.of == second.of and first.state != second.state
    assert first.part("x").state != first.state
