"""How many GPUs a process may use: counted as CUDA counts them, so that launchers, doctor and MXNet agree.

python job/distributed/gpus.py        (prints the number; needs nothing but Python)
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence
from typing import Optional

_SECONDS = 30.0  # nvidia-smi wakes a sleeping driver, which takes seconds; a wedged one never answers


def visible(uuids: Sequence[str], wanted: Optional[str]) -> list[int]:
    """Which of the GPUs CUDA shows, in its order, where ``CUDA_VISIBLE_DEVICES`` is ``wanted``; None if it is not set.

    As CUDA was seen to read it: a number may have anything after it, a UUID may be short, and the first entry that is
    neither, that names nothing, or that is of another kind than the first ends the list. One GPU twice: none at all.
    """
    if wanted is None:
        return list(range(len(uuids)))
    found: list[int] = []
    kinds = set()
    for entry in wanted.split(","):
        number = re.match(r"\s*([+-]?\d+)", entry)
        kinds.add(bool(number))
        index = int(number[1]) if number else _starting_with(uuids, entry.strip())
        if not 0 <= index < len(uuids) or len(kinds) > 1:
            break
        found.append(index)
    return found if len(set(found)) == len(found) else []


def _starting_with(uuids: Sequence[str], start: str) -> int:
    matching = [index for index, uuid in enumerate(uuids) if uuid.upper().startswith(start.upper())]
    return matching[0] if len(start) > len("GPU-") and len(matching) == 1 else -1


def count(listing: str, wanted: Optional[str]) -> int:
    """How many there are, from what ``nvidia-smi -L`` prints. Of the parts of GPUs (MIG) CUDA uses one at most."""
    uuids = re.findall(r"^GPU \d+:.*\(UUID: ([^)]+)\)", listing, re.MULTILINE)
    parts = re.findall(r"^\s+MIG .*\(UUID: +([^)]+)\)", listing, re.MULTILINE)
    if wanted is not None and wanted.strip().upper().startswith("MIG-"):
        return int(wanted.partition(",")[0].strip() in parts)
    seen = len(visible(uuids, wanted))
    return min(1, seen) if parts else seen


def listing() -> str:
    """What ``nvidia-smi -L`` prints; nothing where there is none, or it does not answer."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "-L"], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout


if __name__ == "__main__":
    print(count(listing(), os.environ.get("CUDA_VISIBLE_DEVICES")))
