"""Checkpoints on disk: each a folder of arrays, JSON and checksums, that is there whole or not at all.

    checkpoints/step-00000235/arrays.params   named arrays, in MXNet's own format
                              state.json      everything else
                              manifest.json   format version, step, score; size and SHA-256 of the two, and its own

A checkpoint is written under another name, brought to the disk, and only then given its name: whatever dies at whatever
moment leaves the old one or the new one. No pickle is ever written or read, so that a checkpoint from a stranger can
be wrong, but runs no code.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import struct
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Optional

from job import storage
from job.errors import CheckpointError, UsageError
from job.run_dir import CHECKPOINT, UNFINISHED, finite

if TYPE_CHECKING:  # whoever only looks for a checkpoint need not wait for their import
    import numpy as np

FORMAT = 2  # 1 was of runs without shards
ARRAYS, STATE, MANIFEST = "arrays.params", "state.json", "manifest.json"
_PARTIAL = ".partial"  # ends the name of what is being written or removed

# How MXNet stores arrays (src/ndarray/ndarray.cc): NDARRAY_V2_MAGIC, and the numbers of its types.
_LIST_MAGIC, _ARRAY_MAGIC = 0x112, 0xF993FAC9
_TYPES = {"float32": 0, "float64": 1, "float16": 2, "uint8": 3, "int32": 4, "int8": 5, "int64": 6}


class Damaged(Exception):
    """A checkpoint is not what was written. The message says how one can tell."""


class Checkpoint(NamedTuple):
    """A checkpoint that was read and found intact."""

    step: int  # that the run had taken
    arrays: bytes  # for decode_arrays
    state: bytes  # JSON


class Store:
    """The checkpoints of one run.

    Args:
        folder: where they lie; made when the first is written.
        keep: how many of the newest to keep, beside the best.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self._keep = keep
        self._stay: set[Path] = set()  # of what cannot be removed, and the user knows it

    def write(self, step: int, arrays: Mapping[str, np.ndarray], state: Mapping[str, Any], score: Any = None) -> None:
        """Write a checkpoint, and then remove those that are neither among the newest nor the best.

        Args:
            step: that the run has taken; it names the checkpoint.
            arrays: of at least one axis, by name.
            state: whatever JSON can hold.
            score: of the run at this step, the higher the better; None if unknown.

        Raises:
            OSError: it cannot be written. Those before it stay, and of this one nothing does.
        """
        files = {ARRAYS: encode_arrays(arrays), STATE: encode_state(state)}
        self._put(step, {**files, MANIFEST: _manifest(step, score, files, weights_sha256(part_of(arrays, "network")))})

    def adopt(self, path: Path) -> None:
        """Write a checkpoint that was read from elsewhere and found intact. Raises what :meth:`write` does."""
        self._put(step_of(path), {name: (path / name).read_bytes() for name in (ARRAYS, STATE, MANIFEST)})

    def _put(self, step: int, files: Mapping[str, bytes]) -> None:
        target = self.folder / f"step-{step:08d}"
        temporary = target.with_name(target.name + _PARTIAL)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _remove(temporary)
            temporary.mkdir()
            for name, content in files.items():
                _write(temporary / name, content)
            storage.sync_folder(temporary)
            _remove(target)  # a damaged one, if any: whoever goes on from a step never takes that step again
            os.rename(temporary, target)
            storage.sync_folder(self.folder)
        except OSError:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        self._retain()

    def paths(self) -> list[Path]:
        """The folders of all checkpoints, the newest first."""
        found = self.folder.iterdir() if self.folder.is_dir() else iter(())
        return sorted((path for path in found if CHECKPOINT.fullmatch(path.name)), key=step_of, reverse=True)

    def newest(self, warn: Callable[[str], None]) -> Optional[Checkpoint]:
        """The newest intact checkpoint, None if there is none at all; ``warn`` is told of each damaged one before it.

        Raises:
            CheckpointError: all are damaged, or the newest is of a format that only a newer program knows.
        """
        paths = self.paths()
        for path in paths:
            try:
                return read(path)
            except Damaged as error:
                warn(f"{error}; trying the checkpoint before it")
        if paths:
            raise CheckpointError(
                f"{self.folder}: none of its {len(paths)} checkpoints is intact, nothing to go on from"
            )
        return None

    def choose(self, which: str) -> Path:
        """The checkpoint that is called ``last``, ``best`` (the highest score) or by its step. Nothing of it is read.

        Raises:
            UsageError: there is none that is called so.
        """
        paths = self.paths()
        named = {"last": paths[0] if paths else None, "best": self.best()}
        found = named.get(which) or next((path for path in paths if which == str(step_of(path))), None)
        if found:
            return found
        steps = ", ".join(str(step_of(path)) for path in reversed(paths))
        if not paths:
            raise UsageError(f"{self.folder}: holds no checkpoint")
        if which == "best":
            raise UsageError(f"{self.folder}: no checkpoint was measured yet, so none is best; there are {steps}")
        raise UsageError(f"{self.folder}: no checkpoint after step {which}; there are {steps}, and last and best")

    def best(self) -> Optional[Path]:
        """The checkpoint with the highest score, the first of equals; None if none has any."""
        scores = {path: score for path in self.paths() if (score := score_of(path)) is not None}
        return max(scores, key=lambda path: (scores[path], -step_of(path)), default=None)

    def tidy(self, last_step: int) -> None:
        """Remove what dead writers left, and what lies after ``last_step``, which the run will write anew."""
        for path in list(self.folder.iterdir()) if self.folder.is_dir() else []:
            if UNFINISHED.fullmatch(path.name) or (path in self.paths() and step_of(path) > last_step):
                self._remove_old(path)

    def _retain(self) -> None:
        paths = self.paths()
        best = self.best()
        for path in paths[self._keep :]:
            if path != best:
                self._remove_old(path)

    def _remove_old(self, path: Path) -> None:
        """What is too much is no reason to end a run: on NFS a file that somebody reads stays as long as that."""
        try:
            _remove(path)
        except OSError as error:
            if path not in self._stay:
                print(f"warning: {path}: cannot remove it: {error.strerror}; it stays", file=sys.stderr, flush=True)
            self._stay.add(path)


class BackgroundWriter:
    """Writes checkpoints beside the training, one at a time. A failure is kept until somebody asks for it.

    Not raised where the next one is written: ranks must agree before any of them leaves.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Optional[Future[None]] = None
        self._failure = ""

    def write(self, step: int, arrays: Mapping[str, np.ndarray], state: Mapping[str, Any], score: Any = None) -> None:
        """Start :meth:`Store.write`, once the one before is done. The arrays must not change meanwhile."""
        self.wait()
        if not self._failure:
            self._writing = self._pool.submit(self._store.write, step, arrays, state, score)

    def wait(self) -> None:
        """Wait until nothing is being written."""
        if self._writing:
            try:
                self._writing.result()
            except OSError as error:
                folder = self._store.folder
                self._failure = f"{folder}: cannot write a checkpoint: {error.strerror}; the last good one is kept"
            self._writing = None

    @property
    def failure(self) -> str:
        """What went wrong with a write that is over; empty if nothing did."""
        if self._writing and self._writing.done():
            self.wait()
        return self._failure

    def close(self) -> None:
        """Finish what is being written."""
        self._pool.shutdown()


def read(path: Path) -> Checkpoint:
    """Read one checkpoint and check every byte of it.

    Raises:
        Damaged: it is incomplete, or not what was written.
        CheckpointError: its format is newer than this program.
    """
    manifest = _read_manifest(path)
    try:
        if manifest["format"] > FORMAT:
            raise CheckpointError(
                f"{path}: is of format {manifest['format']}, this program knows formats up to {FORMAT}; use a newer one"
            )
        if manifest["format"] < FORMAT:
            raise CheckpointError(
                f"{path}: was written by an earlier version, whose training summed in another order; go on with that"
                " version, or give another run.dir to train anew"
            )
        arrays, state = (_read_verified(path / name, manifest["files"][name]) for name in (ARRAYS, STATE))
        return Checkpoint(int(manifest["step"]), arrays, state)
    except (KeyError, TypeError, ValueError):
        raise Damaged(f"{path / MANIFEST}: damaged: not a manifest") from None


def weights_sha256(weights: Mapping[str, np.ndarray]) -> str:
    """The SHA-256 of a network's weights and running statistics, by name; equal for equal bits, and only for them.

    Of each array, in the order of names: the line ``NAME TYPE SHAPE`` (``3.gamma float32 20``, ``4.weight float32
    50x20x3x3``), then its numbers, little-endian, in the order of rows.
    """
    digest = hashlib.sha256()
    for name in sorted(weights):
        array = weights[name]
        digest.update(f"{name} {array.dtype.name} {'x'.join(map(str, array.shape))}\n".encode())
        digest.update(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
    return digest.hexdigest()


def part_of(arrays: Mapping[str, np.ndarray], part: str) -> dict[str, np.ndarray]:
    """Of a checkpoint's arrays those of one part, such as ``network``: by their place in the network."""
    return {name[len(part) + 1 :]: array for name, array in arrays.items() if name.startswith(f"{part}/")}


def encode_arrays(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Arrays in the format of ``mx.nd.save``.

    Not by ``mx.nd.save`` itself: it does not notice that the disk was full when its last buffer went there. Nor as
    safetensors, whose library copies all of it once more (``python -m benchmarks.checkpoint_encoding``).
    """
    chunks = [struct.pack("<QQQ", _LIST_MAGIC, 0, len(arrays))]
    for array in arrays.values():
        chunks.append(struct.pack("<Iii", _ARRAY_MAGIC, 0, array.ndim))
        chunks.append(struct.pack(f"<{array.ndim}q", *array.shape))
        chunks.append(struct.pack("<iii", 1, 0, _TYPES[array.dtype.name]))  # of device cpu(0)
        chunks.append(array.tobytes())
    chunks.append(struct.pack("<Q", len(arrays)))
    for name in arrays:
        chunks.append(struct.pack("<Q", len(name.encode())) + name.encode())
    return b"".join(chunks)


def decode_arrays(content: bytes) -> dict[str, np.ndarray]:
    """What :func:`encode_arrays` or ``mx.nd.save`` made of named arrays."""
    import mxnet as mx

    return {name: array.asnumpy() for name, array in mx.nd.load_frombuffer(content).items()}


_NOT_FINITE = [{"float": word} for word in ("nan", "inf", "-inf")]


def encode_state(state: Mapping[str, Any]) -> bytes:
    """As JSON, which has no NaN and no infinity: such a number x is the object ``{"float": "x"}``."""
    return json.dumps(_spelled(state), allow_nan=False).encode()


def decode_state(content: bytes) -> dict[str, Any]:
    """What :func:`encode_state` made, now or in an earlier version that wrote the bare word NaN."""
    state: dict[str, Any] = json.loads(
        content, object_hook=lambda held: float(held["float"]) if held in _NOT_FINITE else held
    )
    return state


def _spelled(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _spelled(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_spelled(item) for item in value]
    return {"float": str(value)} if isinstance(value, float) and not math.isfinite(value) else value


def _manifest(step: int, score: Any, files: Mapping[str, bytes], weights: str) -> bytes:
    sums = {name: {"bytes": len(content), "sha256": _sha256(content)} for name, content in files.items()}
    manifest = {"format": FORMAT, "step": step, "score": finite(score), "weights_sha256": weights, "files": sums}
    return json.dumps({**manifest, "sha256": _sha256_of(manifest)}, indent=2, allow_nan=False).encode()


def _read_manifest(path: Path) -> dict[str, Any]:
    content = _read(path / MANIFEST)
    try:
        manifest = json.loads(content)
        digest = manifest.pop("sha256")
    except (ValueError, KeyError, AttributeError, TypeError):
        raise Damaged(f"{path / MANIFEST}: damaged: not a manifest") from None
    if digest != _sha256_of(manifest):
        raise Damaged(f"{path / MANIFEST}: damaged: wrong checksum")
    return dict(manifest)


def _read_verified(file: Path, expected: Mapping[str, Any]) -> bytes:
    content = _read(file)
    if len(content) != expected["bytes"]:
        raise Damaged(f"{file}: damaged: {len(content)} bytes, expected {expected['bytes']}")
    if _sha256(content) != expected["sha256"]:
        raise Damaged(f"{file}: damaged: wrong checksum")
    return content


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise Damaged(f"{file}: cannot be read: {error.strerror}") from None


def score_of(path: Path) -> Any:
    """The score of a checkpoint, None if it has none or is damaged."""
    try:
        return _read_manifest(path)["score"]
    except (Damaged, KeyError):
        return None


def step_of(path: Path) -> int:
    """The steps that the run of a checkpoint had taken, by the name of its folder."""
    return int(path.name.partition("-")[2])


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _sha256_of(manifest: Mapping[str, Any]) -> str:
    return _sha256(json.dumps(manifest, sort_keys=True).encode())


def _write(file: Path, content: bytes) -> None:
    with open(file, "wb", buffering=0) as stream:
        left = memoryview(content)
        while left:
            left = left[stream.write(left) :]
        os.fsync(stream.fileno())


def _remove(path: Path) -> None:
    """Remove a folder so that at no moment half of it bears the name of a checkpoint."""
    if path.exists():
        if not path.name.endswith(_PARTIAL):
            renamed = path.with_name(f"{path.name}.old{_PARTIAL}")
            os.rename(path, renamed)
            path = renamed
        shutil.rmtree(path)
