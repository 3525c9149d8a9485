"""A data set of a few hundred images that a network can learn, made where a test needs one."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
from PIL import Image

TRAIN, TEST = 600, 200


def write(folder: Path, seed: int = 0) -> list[str]:
    """Write the four IDX files, and return the overrides that make a run use them: 6 steps an epoch."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    for count, name in ((TRAIN, "train"), (TEST, "t10k")):
        labels = random.integers(0, 10, count, dtype=np.uint8)
        images = (random.integers(0, 128, (count, 28, 28)) + labels[:, None, None] * 12).astype(np.uint8)
        (folder / f"{name}-images-idx3-ubyte").write_bytes(struct.pack(">4I", 0x803, count, 28, 28) + images.tobytes())
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 0x801, count) + labels.tobytes())
    files = ("train_images", "train_labels", "test_images", "test_labels")
    return [f"data.dir={folder}", *(f"data.sha256.{file}=any" for file in files), "data.global_batch=100"]


def coloured(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Pictures (n, 3, 32, 32), and labels (n,) of the classes blue, green and red in turn."""
    random = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    pixels = random.integers(0, 128, (count, 3, 32, 32))
    pixels[np.arange(count), 2 - labels] += 100
    return pixels.astype(np.uint8), labels


def write_pictures(folder: Path, train: int = 120, test: int = 30) -> list[str]:
    """Write them as PNG into train/CLASS/ and test/CLASS/, and return the overrides that make a run use them."""
    for count, part, seed in ((train, "train", 1), (test, "test", 2)):
        for number, (pixels, label) in enumerate(zip(*coloured(count, seed))):
            path = folder / part / ("blue", "green", "red")[label] / f"{number:05}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.transpose(1, 2, 0)).save(path)
    return [f"data.dir={folder}", "data.global_batch=24"]


def _in_order_of_folders(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    pixels, labels = coloured(count, seed)
    order = np.argsort(labels, kind="stable")  # by class, then by name
    return pixels[order], labels[order]


def write_records(folder: Path, train: int = 120, test: int = 30) -> list[str]:
    """The pictures of :func:`write_pictures` as ``im2rec --encoding .png`` would write them."""
    from mxnet import recordio

    folder.mkdir(parents=True, exist_ok=True)
    for count, part, seed in ((train, "train", 1), (test, "test", 2)):
        record = recordio.MXIndexedRecordIO(str(folder / f"{part}.idx"), str(folder / f"{part}.rec"), "w")
        for number, (pixels, label) in enumerate(zip(*_in_order_of_folders(count, seed))):
            file = io.BytesIO()
            Image.fromarray(pixels.transpose(1, 2, 0)).save(file, "PNG")
            record.write_idx(number, recordio.pack(recordio.IRHeader(0, float(label), number, 0), file.getvalue()))
        record.close()
    (folder / "classes.txt").write_text("blue\ngreen\nred\n")
    return [f"data.dir={folder}", "data.global_batch=24"]


def write_coloured_idx(folder: Path, train: int = 120, test: int = 30) -> list[str]:
    """The pictures of :func:`write_pictures` as IDX files with four axes."""
    folder.mkdir(parents=True, exist_ok=True)
    for count, part, seed in ((train, "train", 1), (test, "t10k", 2)):
        pixels, labels = _in_order_of_folders(count, seed)
        images = struct.pack(">5I", 0x804, *pixels.shape) + pixels.tobytes()
        (folder / f"{part}-images-idx4-ubyte").write_bytes(images)
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 0x801, count) + bytes(labels.tolist()))
    (folder / "classes.txt").write_text("blue\ngreen\nred\n")
    return [f"data.dir={folder}", "data.sha256=any", "data.global_batch=24"]
