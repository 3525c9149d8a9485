#!/usr/bin/env python
"""A run's model as a file that works without this project: ``python job/export.py RUN [--format onnx]``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if not __package__:  # run as a script: find the package from any directory, and keep job/ itself off the path
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from job.distributed.search_path import explain_imports

if __name__ == "__main__":
    explain_imports()

from job import command
from job.config import from_home
from job.data import formats as data
from job.exporting import trained as runs
from job.exporting.formats import FORMATS, target, unfinished
from job.exporting.served import input_shape, metadata
from job.quick_import import quicken


def main() -> None:
    """Export, check what was written against the run, and only then give it its name."""
    parser = argparse.ArgumentParser(
        prog="export.py",
        description="Write the model of a run in a format that works without this project. It takes uint8 pixels as"
        " they are. It is compared with the run's network on 1,000 test images before it gets its name.",
        epilog="exit codes: 0 done; 1 failed, nothing was written; 2 bad usage",
    )
    parser.add_argument("run", type=from_home, metavar="RUN", help="the folder of a run (run.dir)")
    parser.add_argument(
        "overrides", nargs="*", metavar="key.path=value", help="what has been moved since the run, such as data.dir=..."
    )
    parser.add_argument("--format", choices=list(FORMATS), help="default: as --output ends, else onnx")
    parser.add_argument(
        "--checkpoint",
        default="last",
        metavar="last|best|STEP",
        help="default: last; best is the one that measured best",
    )
    parser.add_argument(
        "--no-average", action="store_true", help="not the moving average of the weights, if the run keeps one"
    )
    parser.add_argument("--output", type=from_home, metavar="FILE", help="default: model.onnx in RUN, or the like")
    export(parser.parse_intermixed_args())


def export(options: argparse.Namespace) -> None:
    """Do what the command line asks for, and say what came out.

    Raises:
        JobError: the run or the output is not usable, or the exported model does not agree with the run.
    """
    config = runs.configuration(options.run, options.overrides)
    name, output = target(options.format, options.output, options.run)
    quicken()
    trained = runs.load(options.run, config, options.checkpoint, not options.no_average)
    which = "the average of the weights" if trained.averaged else "the weights"
    print(f"{which} after step {trained.step} of {options.run}", flush=True)
    dataset = data.load(config.data)
    runs.require_same_data(trained, dataset.about)

    from job.exporting.agreement import compare  # only now, for it imports MXNet

    with unfinished(output) as file:
        FORMATS[name].write(trained, metadata(trained), file)
        found = compare(FORMATS[name].read(file), trained, dataset.test)
    if name == "onnx" and trained.model.weights_dtype != "float32":
        print(f"note: the run is in {trained.model.dtype}, the model in float32; --format mxnet keeps it")
    if better := runs.better(options.run, options.checkpoint):
        print(f"note: the run measured better after step {better}; --checkpoint best exports that")
    apart = f"within {found.difference:.1e}" if found.difference else "to the bit"
    measured = "as the run measured" if trained.accuracy is not None else "which the run did not measure at this step"
    shape = ", ".join(map(str, ("N", *input_shape(trained.about))))
    print(f"the same probabilities as the run's network for {found.pictures:,} test images, {apart}")
    print(f"test accuracy {found.right / found.total:.4f} on {found.total:,} images, {measured}")
    print(f"done: {output}: uint8 ({shape}) to {len(trained.about.classes)} probabilities")


if __name__ == "__main__":
    command.run(main)
