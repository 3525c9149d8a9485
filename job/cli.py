"""The command line of training: ``[--config FILE] [--check] [--quiet] [key.path=value ...]``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn, Optional

from job import run_dir
from job.checkpoints import resume
from job.checkpoints.commits import TAKEOVER_SECONDS, supervised
from job.config import DEFAULT_FILE, Config, choices_of, default_of, fields, from_home, load_config, written
from job.distributed.placement import placement
from job.errors import DataError, UsageError
from job.fitness import preflight

_DESCRIPTION = """Train a Gluon network with BatchNorm on Fashion-MNIST, on any number of ranks.

  python job/train.py                                        one rank
  horovodrun -np 4 python job/train.py                       four ranks: the same result, sooner
  python job/train.py train.epochs=10 optimizer.learning_rate=0.1 run.dir=runs/longer
"""

_COLUMN = 43  # of the descriptions in the list of keys


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; --help shows the usage")


def parse(arguments: Optional[Sequence[str]] = None) -> Config:
    """The configuration that the command line asks for, checked against all that can be known before ranks start.

    ``--help`` and ``--check`` end the process with exit code 0. After ``--quiet`` standard output leads nowhere.

    Raises:
        UsageError: the command line, the configuration, the run directory or the device is not usable.
        JobError: there is no room for the run.
    """
    parser = _Parser(
        prog="train.py",
        description=_DESCRIPTION,
        epilog=_keys() + "\nexit codes: 0 done; 1 failed; 2 bad configuration or usage, nothing was started;"
        " 75 preempted, run again to continue",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config",
        type=from_home,
        metavar="FILE",
        help=f"configuration file (YAML; default: configs/{DEFAULT_FILE.name})",
    )
    parser.add_argument(
        "--check", action="store_true", help="check everything, print the whole configuration, start nothing"
    )
    parser.add_argument("--quiet", action="store_true", help="print only warnings and errors")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="values that replace those of the file")
    options = parser.parse_intermixed_args(arguments)
    if options.quiet and not options.check:  # a launcher reads what --check prints
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  (for the life of the process)
    config = load_config(options.config, options.overrides)
    require_samples(config, placement().size, config.data.global_batch_of(placement().size))
    if placement().rank == 0:
        if supervised():
            run_dir.wait_until_free(config.run.dir, TAKEOVER_SECONDS)
        run_dir.check(config)
        resume.check(config, placement().size)
    warnings = preflight.check(config) if placement().local_rank == 0 else []
    _check_data(config)
    if options.check:  # silent about warnings: the run that is to follow tells them
        print(config.to_yaml(), end="")
        sys.exit(0)
    if placement().rank == 0:
        preflight.tell(warnings)
    return config


def _check_data(config: Config) -> None:
    """Look at the data, and on rank 0 at the network for it. Of the project's own there is nothing to find out.

    Every rank looks at pictures: what takes long to find out is found out once on each node, and the others wait.
    """
    model = config.model.model_copy(update={"weights": None}) if resume.goes_on(config) else config.model
    data, rank = config.data, placement().rank
    fashion_mnist = not data.is_pictures and "any" not in data.sha256.model_dump().values()
    known = fashion_mnist and model.is_tutorial and not model.weights and not data.augment.changes
    if known or (rank and not data.is_pictures):
        return
    from job.data import formats  # only now, for they import numpy and MXNet
    from job.data.dataset import FASHION_MNIST

    try:
        about = FASHION_MNIST if fashion_mnist else formats.load(data, _tell).about
    except DataError as error:  # which nobody has to start ranks for
        if placement().local_rank:  # the first one of the node tells
            return
        raise UsageError(str(error)) from None
    if rank == 0:
        from job.networks.check import check
        from job.training.augmentation import require_fit

        require_fit(data.augment, about)
        check(model, len(about.classes), about.shape)


def _tell(line: str) -> None:
    """On standard error: ``--check`` prints a configuration."""
    print(line, file=sys.stderr, flush=True)


def require_samples(config: Config, ranks: int, smallest_batch: int) -> None:
    """Every rank needs a sample in every micro-batch, because MXNet 1.9 has no empty arrays.

    Raises:
        UsageError: the smallest global batch is too small for the ranks.
    """
    micros = config.train.accumulate_steps
    if smallest_batch < ranks * micros:
        raise UsageError(
            f"a global batch of {smallest_batch} samples is too small for {ranks} ranks"
            + (f" x {micros} micro-batches (train.accumulate_steps)" if micros > 1 else "")
            + "; raise data.global_batch or start fewer ranks"
        )


def settle_shards(config: Config, ranks: int, smallest_batch: int, tell: bool) -> Config:
    """The configuration with the number of shards that is used: at least the ranks, at most the smallest batch.

    If it is not the one that was asked for, and ``tell``, it is said, and written to the run's ``config.yaml``.
    """
    asked, micros = config.data.shards, config.train.accumulate_steps
    shards = min(max(asked, ranks), smallest_batch // micros)
    config = config.model_copy(update={"data": config.data.model_copy(update={"shards": shards})})
    if tell and shards != asked:
        why = (
            f"{ranks} ranks need as many"
            if shards > asked
            else f"the smallest {'micro-' * (micros > 1)}batch is of {shards} samples"
        )
        print(f"data.shards={shards}, not {asked}: {why}", flush=True)
        run_dir.write_whole(config.run.dir / run_dir.CONFIG, config.to_yaml())
    return config


def _keys() -> str:
    """All keys with default and meaning, one a line, grouped by section."""
    lines = ["keys, with their defaults:"]
    for key, field in fields():
        assignment = f"{key}={written(default_of(field))}"
        if len(assignment) > _COLUMN:
            lines.append(f"  {assignment}")
            assignment = ""
        choices = f"{'|'.join(choices_of(field))}: " if choices_of(field) else ""
        lines.append(f"  {assignment:<{_COLUMN}} {choices}{field.description}")
    return "\n".join(lines) + "\n"
