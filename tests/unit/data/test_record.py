"""RecordIO, written here by MXNet's own writer as ``im2rec`` uses it."""

from __future__ import annotations

import io
import threading
from pathlib import Path
from typing import Any

import numpy as np
from mxnet import recordio
from PIL import Image

from job.config import DataConfig
from job.data import formats
from job.data.dataset import Dataset
from tests import synthetic


def load(folder: Path, **more: Any) -> Dataset:
    config = DataConfig(dir=folder, cache_dir=folder.with_name("cache"), **more)
    return formats.load(config, lambda line: None)


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 5), (value, 2, 3)).save(file, "PNG")
    return file.getvalue()


def write(
    folder: Path, labels: list[Any], contents: list[bytes], order: list[int], parts: Any = ("train", "test")
) -> None:
    """Records with keys of their own, in the order of a shuffled list."""
    folder.mkdir(exist_ok=True)
    for part in parts:
        writer = recordio.MXIndexedRecordIO(str(folder / f"{part}.idx"), str(folder / f"{part}.rec"), "w")
        for key in order:
            header = recordio.IRHeader(0, labels[key], key, 0)
            writer.write_idx(100 + key, recordio.pack(header, contents[key]))
        writer.close()


def test_samples_have_the_order_of_the_index_and_classes_their_numbers(tmp_path: Path) -> None:
    write(tmp_path / "data", [0.0, 1.0, 2.0, 1.0], [png(value) for value in (10, 20, 30, 40)], [2, 0, 3, 1])
    dataset = load(tmp_path / "data")
    assert dataset.about.classes == ("0", "1", "2") and dataset.about.shape == (3, 5, 4)
    assert dataset.train.labels.tolist() == [2, 0, 1, 1]
    assert dataset.train.images[:][:, 0, 0, 0].tolist() == [30, 10, 40, 20]


def test_a_label_in_a_list_of_one_is_a_label(tmp_path: Path) -> None:
    write(tmp_path / "data", [[0.0], [1.0]], [png(1), png(2)], [0, 1])
    assert load(tmp_path / "data").train.labels.tolist() == [0, 1]


def test_what_the_data_is_follows_from_what_is_in_the_records(tmp_path: Path) -> None:
    write(tmp_path / "data", [0, 1], [png(1), png(2)], [0, 1])
    before = load(tmp_path / "data").digests
    write(tmp_path / "data", [0, 1], [png(1), png(3)], [0, 1], ["train"])
    after = load(tmp_path / "data").digests
    assert {key for key in before if before[key] != after[key]} == {"train_images"}


def test_damaged_records_and_pictures_are_left_out_counted_and_listed(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    write(folder, [0, 1, 2, 1], [png(value) for value in (10, 20, 30, 40)], [0, 1, 2, 3], ["train"])
    write(folder, [0, 1], [png(10), b"no picture"], [0, 1], ["test"])
    content = bytearray((folder / "train.rec").read_bytes())
    start = int((folder / "train.idx").read_text().split()[3])
    content[start : start + 4] = b"xxxx"  # of the magic number of record 101
    (folder / "train.rec").write_bytes(content)
    dataset = load(folder, on_damaged="skip")
    assert dataset.train.labels.tolist() == [0, 2, 1]
    assert dataset.train.images[:][:, 0, 0, 0].tolist() == [10, 30, 40]
    assert dataset.about.left_out == (f"{folder}/train.rec, record 101", f"{folder}/test.rec, record 101")


def test_threads_read_side_by_side(tmp_path: Path) -> None:
    synthetic.write_records(tmp_path / "data", train=60, test=6)
    dataset = load(tmp_path / "data", decode_threads=8)
    expected = dataset.train.images[:]
    wrong: list[int] = []

    def read(first: int) -> None:
        if not np.array_equal(dataset.train.images[first:60:4], expected[first:60:4]):
            wrong.append(first)

    threads = [threading.Thread(target=read, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
