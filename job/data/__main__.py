"""``python -m job.data [data.key=value ...]``: fetch and verify the data, and say where it is."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from job import command
from job.config import load_config
from job.data import idx


def main(arguments: Sequence[str] | None = None) -> None:
    """Fetch and verify; print where each file is.

    Raises:
        JobError: the configuration is wrong, or the data cannot be had.
    """
    parser = argparse.ArgumentParser(
        prog="python -m job.data",
        description="Fetch Fashion-MNIST unless it is here, verify it, and say where it is.",
        epilog="exit codes: 0 done; 1 failed; 2 bad configuration or usage",
    )
    parser.add_argument("overrides", nargs="*", metavar="data.key=value", help="as for train.py")
    data = idx.load(load_config(overrides=parser.parse_args(arguments).overrides).data)
    for array in (*data.train, *data.test):
        print(f"{getattr(array, 'filename', 'data')}: {len(array)} x {array.shape[1:] or 'label'}, verified")


if __name__ == "__main__":
    command.run(main)
