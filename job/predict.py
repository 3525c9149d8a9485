#!/usr/bin/env python
"""What a model says of pictures: ``python job/predict.py RUN_OR_MODEL image.png ...``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Optional

if not __package__:  # run as a script: find the package from any directory, and keep job/ itself off the path
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from job.distributed.search_path import explain_imports

if __name__ == "__main__":
    explain_imports()

import numpy as np
from rich.console import Console
from rich.progress import Progress

from job import command
from job.config import from_home
from job.distributed.placement import cores
from job.errors import DataError, UsageError
from job.exporting import formats, pictures
from job.exporting.pictures import Prepared
from job.exporting.served import Model
from job.quick_import import quicken

_BATCH = 64


class Answer(NamedTuple):
    """What there is to say of one file: classes with probabilities, the most likely first, or why there are none."""

    file: str
    classes: Sequence[tuple[str, float]] = ()
    converted: str = ""  # what was done to the picture, in words
    error: str = ""


def main() -> int:
    """Ask the model about each picture, and say what it answers. 1 if a file was no picture that it can judge."""
    parser = argparse.ArgumentParser(
        prog="predict.py",
        description="Say what pictures show. A picture of any size and mode is brought to those of the data set, and"
        " what was done to it is said.",
        epilog="exit codes: 0 done; 1 a file could not be read as a picture, or the model failed; 2 bad usage",
    )
    parser.add_argument(
        "model", type=from_home, metavar="RUN_OR_MODEL", help="the folder of a run, or what job/export.py has made"
    )
    parser.add_argument(
        "images",
        nargs="+",
        type=from_home,
        metavar="IMAGE",
        help="a picture, a folder of them, or - for names on stdin",
    )
    parser.add_argument("--top", type=_count, default=3, metavar="N", help="classes to name for each (default: 3)")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line for each file")
    parser.add_argument("--checkpoint", metavar="last|best|STEP", help="of a run (default: last)")
    parser.add_argument(
        "--invert", choices=("yes", "no"), help="whether to negate (default: light grounds, if the data set's are dark)"
    )
    options = parser.parse_intermixed_args()
    names = list(_named(options.images))
    if not names:
        raise UsageError("standard input names no picture; give names, one a line")
    model = _opened(options.model, options.checkpoint)
    invert = None if options.invert is None else options.invert == "yes"
    show = _print_json if options.json else _Table([str(name) for name, _ in names], model.about.classes, options.top)
    failed = 0
    for answer in _progress(_answers(model, names, options.top, invert), len(names)):
        show(answer)
        failed += bool(answer.error)
    return 1 if failed else 0


def _count(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of classes, from 1")
    return int(text)


def _named(images: Sequence[Path]) -> Iterator[tuple[Path, str]]:
    for image in images:
        listed = [Path(line.rstrip("\n")) for line in sys.stdin if line.strip()] if str(image) == "-" else [image]
        yield from pictures.files_in(listed)


def _opened(path: Path, checkpoint: Optional[str]) -> Model:
    quicken()
    if os.path.isdir(path):
        return formats.open_run(path, checkpoint or "last")
    if checkpoint:
        raise UsageError("--checkpoint is for the folder of a run, and an exported model has only one")
    return formats.open_model(path)


def _answers(model: Model, names: Sequence[tuple[Path, str]], top: int, invert: Optional[bool]) -> Iterator[Answer]:
    """An answer for each file, in turn. A batch of pictures is decoded by all cores, and computed together."""
    with ThreadPoolExecutor(cores(), thread_name_prefix="decode") as pool:
        for first in range(0, len(names), _BATCH):
            batch = names[first : first + _BATCH]
            found = list(pool.map(lambda named: _prepared(named[0], named[1], model, invert), batch))
            good = [outcome for outcome in found if isinstance(outcome, Prepared)]
            rows = iter(model.probabilities(np.stack([one.pixels for one in good])) if good else ())
            for (file, _), outcome in zip(batch, found):
                if isinstance(outcome, str):
                    yield Answer(str(file), error=outcome)
                else:
                    yield Answer(str(file), _best(next(rows), model.about.classes, top), outcome.done)


def _prepared(file: Path, wrong: str, model: Model, invert: Optional[bool]) -> Prepared | str:
    """A picture for the model, or why there is none."""
    try:
        return wrong or pictures.prepare(file, model.about, invert)
    except DataError as error:
        return str(error)


def _best(probabilities: np.ndarray, classes: Sequence[str], top: int) -> list[tuple[str, float]]:
    order = np.argsort(-probabilities, kind="stable")[:top]
    return [(classes[index], float(probabilities[index])) for index in order]


class _Table:
    """A line for each file, as soon as it is known; what is wrong with one goes to standard error."""

    def __init__(self, names: Sequence[str], classes: Sequence[str], top: int) -> None:
        self._file_width = max(4, *(len(_shown(name)) for name in names))
        self._class_width = max(map(len, classes))
        places = (f"{place + 1}." for place in range(min(top, len(classes))))
        heads = "  ".join(f"{place:<{self._class_width + 7}}" for place in places)
        print(f"{'file':<{self._file_width}}  {heads}  converted".rstrip())

    def __call__(self, answer: Answer) -> None:
        if answer.error:
            print(f"error: {answer.error}", file=sys.stderr, flush=True)
            return
        cells = "  ".join(f"{name:<{self._class_width}} {value:.4f}" for name, value in answer.classes)
        print(f"{_shown(answer.file):<{self._file_width}}  {cells}  {answer.converted}".rstrip(), flush=True)


def _print_json(answer: Answer) -> None:
    classes = [{"class": name, "probability": value} for name, value in answer.classes]
    said = {"error": answer.error} if answer.error else {"classes": classes, "converted": answer.converted}
    print(json.dumps({"file": answer.file, **said}), flush=True)


def _shown(name: str) -> str:
    """A file name may hold whatever would move the cursor."""
    return name if name.isprintable() else repr(name)


def _progress(answers: Iterator[Answer], total: int) -> Iterator[Answer]:
    """With a bar, for more than one batch on a terminal: below the table, or alone if that goes elsewhere."""
    beside = sys.stdout.isatty()
    console = Console(stderr=not beside)
    quiet = total <= _BATCH or not console.is_terminal
    with Progress(console=console, transient=True, disable=quiet, redirect_stdout=beside) as bar:
        yield from bar.track(answers, total, description="predicting")


if __name__ == "__main__":
    command.run(main)
