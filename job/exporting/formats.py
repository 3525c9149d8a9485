"""The formats that a model is exported in, and files of them, whole or not there at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Optional

from job import storage
from job.errors import JobError, UsageError
from job.exporting import to_mxnet, to_onnx, to_safetensors
from job.exporting.served import Model
from job.exporting.trained import Trained, configuration, load


class Format(NamedTuple):
    """A format: how its files end, and what writes and reads them."""

    ending: str
    write: Callable[[Trained, Mapping[str, str], Path], None]
    read: Callable[[Path], Model]


FORMATS = {
    "onnx": Format(".onnx", to_onnx.write, to_onnx.read),
    "mxnet": Format(to_mxnet.SYMBOL, to_mxnet.write, to_mxnet.read),
    "safetensors": Format(".safetensors", to_safetensors.write, to_safetensors.read),
}


def format_of(file: Path) -> Optional[str]:
    """The name of the format that a file has by its ending; None if it is none of ours."""
    return next((name for name, form in FORMATS.items() if file.name.endswith(form.ending)), None)


def open_run(folder: Path, checkpoint: str) -> Model:
    """The model that :func:`job.exporting.trained.load` finds, as it would be exported.

    Raises:
        JobError: the folder is not that of a run, or the checkpoint is missing or damaged.
    """
    found = load(folder, configuration(folder), checkpoint)

    from job.exporting import graph  # only now, for it imports MXNet

    return graph.model(found)


def open_model(file: Path) -> Model:
    """Load an exported model.

    Raises:
        UsageError: it has the name of no such file.
        JobError: it is damaged, or another program has made it.
    """
    name = format_of(file)
    if not file.is_file():
        raise UsageError(f"{file}: no such file; give the folder of a run, or a model that job/export.py has made")
    if name is None:
        endings = ", ".join(form.ending for form in FORMATS.values())
        raise UsageError(f"{file}: is no exported model, whose name ends with {endings}")
    return FORMATS[name].read(file)


def target(name: Optional[str], output: Optional[Path], folder: Path) -> tuple[str, Path]:
    """The format and the file to write: what ``--format`` and ``--output`` ask for, in ``folder`` if they do not say.

    Raises:
        UsageError: they contradict each other, or there can be no such file.
    """
    if output is None:
        name = name or "onnx"
        return name, folder / f"model{FORMATS[name].ending}"
    by_ending = format_of(output)
    if name and by_ending and name != by_ending:
        raise UsageError(f"--output {output} ends as {by_ending} does, and --format says {name}; leave one of them out")
    name = name or by_ending or "onnx"
    if not by_ending:
        output = output.with_name(output.name + FORMATS[name].ending)
    if os.path.isdir(output):
        raise UsageError(f"{output} is a folder; --output names a file")
    if not os.path.isdir(output.parent):
        raise UsageError(f"{output.parent}: no such folder; make it, or give another --output FILE")
    return name, output


@contextmanager
def unfinished(file: Path) -> Iterator[Path]:
    """Where to write what is to become ``file``. Its files get their places at the end; after a failure, none does.

    Raises:
        JobError: there is no room, or no permission.
    """
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{file.name}.", dir=file.parent))
        try:
            yield folder / file.name
            for written in sorted(folder.iterdir()):
                with open(written, "rb") as stream:
                    os.fsync(stream.fileno())
                os.replace(written, file.parent / written.name)
            storage.sync_folder(file.parent)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        raise JobError(f"{file}: cannot be written: {error.strerror}; give another --output FILE") from None
