"""Counting GPUs as CUDA does. The cases of ``visible`` were seen on a machine with one GPU, but for those with more."""

from __future__ import annotations

from typing import Optional

import pytest

from job.distributed.gpus import count, visible

UUIDS = ["GPU-c4fd4b97-cedf", "GPU-d0000000-aaaa", "GPU-d1111111-bbbb"]
LISTING = "".join(f"GPU {index}: NVIDIA A100 (UUID: {uuid})\n" for index, uuid in enumerate(UUIDS))
MIG = f"{LISTING}  MIG 1g.5gb      Device  0: (UUID: MIG-1f2e)\n  MIG 1g.5gb      Device  1: (UUID: MIG-3a4b)\n"


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (None, [0, 1, 2]),
        ("", []), ("-1", []), ("abc", []), ("3", []), ("3,0", []), ("-1,0", []), (",0", []), ("MIG-xyz", []),
        ("0", [0]), ("0,-1,1", [0]), ("0,abc", [0]), ("0,,1", [0]), ("0,", [0]), (" 0", [0]), ("+0", [0]), ("00", [0]),
        ("0;1", [0]), ("2,0", [2, 0]), ("0,0", []), ("0,1,0", []),
        ("GPU-c4fd4b97-cedf", [0]), ("GPU-c", [0]), ("GPU-C4FD", [0]), ("GPU-", []), ("GPU", []), ("GPU-d", []),
        ("GPU-d1,GPU-d0", [2, 1]), ("GPU-d1,0", [2]), ("0,GPU-d1", [0]), ("GPU-c,GPU-c", []),
    ],
)  # fmt: skip
def test_the_gpus_that_a_setting_shows(wanted: Optional[str], expected: list[int]) -> None:
    assert visible(UUIDS, wanted) == expected


@pytest.mark.parametrize(
    ("listing", "wanted", "expected"),
    [
        ("", None, 0), ("NVIDIA-SMI has failed", None, 0), (LISTING, None, 3), (LISTING, "2", 1), (LISTING, "", 0),
        (MIG, None, 1), (MIG, "MIG-1f2e", 1), (MIG, "MIG-1f2e,MIG-3a4b", 1), (MIG, "MIG-other", 0), (MIG, "", 0),
    ],
)  # fmt: skip
def test_how_many_gpus_nvidia_smi_lists(listing: str, wanted: Optional[str], expected: int) -> None:
    assert count(listing, wanted) == expected
