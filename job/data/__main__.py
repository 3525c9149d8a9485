"""``python -m job.data [data.key=value ...]``: fetch, verify and list the data, and say what it is."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from job import command
from job.config import load_config
from job.data import formats


def main(arguments: Sequence[str] | None = None) -> None:
    """Do once what a run's first start takes long for; print what the data is.

    Raises:
        JobError: the configuration is wrong, or the data cannot be had.
    """
    parser = argparse.ArgumentParser(
        prog="python -m job.data",
        description="Fetch Fashion-MNIST unless it is here, or look at your own data, verify it, and say what it is.",
        epilog="exit codes: 0 done; 1 failed; 2 bad configuration or usage",
    )
    parser.add_argument("overrides", nargs="*", metavar="data.key=value", help="as for train.py")
    config = load_config(overrides=parser.parse_args(arguments).overrides).data
    data = formats.load(config)
    if not config.is_pictures:
        arrays: tuple[Any, ...] = (*data.train, *data.test)
        for array in arrays:
            print(f"{array.filename}: {len(array)} x {array.shape[1:] or 'label'}, verified")
    print(formats.summary(config, data), end="")


if __name__ == "__main__":
    command.run(main)
