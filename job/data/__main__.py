"""``python -m job.data [data.key=value ...]``: fetch and verify the data, and say where it is."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from job.config import load_config
from job.data import idx
from job.errors import JobError


def main(arguments: Sequence[str] | None = None) -> int:
    """Fetch and verify; print where each file is. The exit code: 0 done, 1 failed, 2 bad configuration."""
    try:
        data = idx.load(load_config(overrides=sys.argv[1:] if arguments is None else arguments).data)
    except JobError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    for array in (*data.train, *data.test):
        print(f"{getattr(array, 'filename', 'data')}: {len(array)} x {array.shape[1:] or 'label'}, verified")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
