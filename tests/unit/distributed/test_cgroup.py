"""The limits of control groups, read from trees of files as the kernel shows them."""

from __future__ import annotations

from pathlib import Path

import pytest

from job.distributed.cgroup import cpu_quota, memory_limit

GIB = 1 << 30


def system(root: Path, groups: str, files: dict[str, str]) -> Path:
    """A root whose process is in ``groups``, with ``files`` under /sys/fs/cgroup."""
    (root / "proc" / "self").mkdir(parents=True)
    (root / "proc" / "self" / "cgroup").write_text(groups)
    for name, content in files.items():
        file = root / "sys" / "fs" / "cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content + "\n")
    return root


def test_a_container_of_version_2_sees_its_limits_at_the_root(tmp_path: Path) -> None:
    root = system(tmp_path, "0::/\n", {"cpu.max": "150000 100000", "memory.max": str(4 * GIB)})
    assert (cpu_quota(root), memory_limit(root)) == (1.5, 4 * GIB)


def test_the_tightest_of_the_groups_above_counts(tmp_path: Path) -> None:
    files = {
        "batch.slice/cpu.max": "400000 100000",
        "batch.slice/job.scope/cpu.max": "800000 100000",
        "batch.slice/memory.max": str(8 * GIB),
        "batch.slice/job.scope/memory.max": str(16 * GIB),
        "other.slice/cpu.max": "100000 100000",
    }
    root = system(tmp_path, "0::/batch.slice/job.scope\n", files)
    assert (cpu_quota(root), memory_limit(root)) == (4.0, 8 * GIB)


V1 = "9:name=systemd:/\n4:memory:/docker/abc\n2:cpu,cpuacct:/docker/abc\n0::/\n"


def test_version_1_is_read_where_its_controllers_are_mounted(tmp_path: Path) -> None:
    files = {
        "cpu,cpuacct/docker/abc/cpu.cfs_quota_us": "200000",
        "cpu,cpuacct/docker/abc/cpu.cfs_period_us": "100000",
        "cpu,cpuacct/cpu.cfs_quota_us": "-1",
        "cpu,cpuacct/cpu.cfs_period_us": "100000",
        "memory/docker/abc/memory.limit_in_bytes": str(2 * GIB),
        "memory/memory.limit_in_bytes": "9223372036854771712",
    }
    root = system(tmp_path, V1, files)
    assert (cpu_quota(root), memory_limit(root)) == (2.0, 2 * GIB)


def test_inside_a_container_of_version_1_the_hosts_path_is_not_there_and_the_root_counts(tmp_path: Path) -> None:
    files = {
        "cpu,cpuacct/cpu.cfs_quota_us": "300000",
        "cpu,cpuacct/cpu.cfs_period_us": "100000",
        "memory/memory.limit_in_bytes": str(GIB),
    }
    root = system(tmp_path, V1, files)
    assert (cpu_quota(root), memory_limit(root)) == (3.0, GIB)


@pytest.mark.parametrize(
    ("groups", "files"),
    [
        ("", {}),
        ("0::/\n", {}),
        ("0::/\n", {"cpu.max": "max 100000", "memory.max": "max"}),
        (V1, {"cpu,cpuacct/cpu.cfs_quota_us": "-1", "memory/memory.limit_in_bytes": "9223372036854771712"}),
        ("0::/\n", {"cpu.max": "", "memory.max": "?"}),
    ],
    ids=["no groups", "no files", "version 2 without limits", "version 1 without limits", "unreadable"],
)
def test_no_limit_is_none(tmp_path: Path, groups: str, files: dict[str, str]) -> None:
    root = system(tmp_path, groups, files)
    assert (cpu_quota(root), memory_limit(root)) == (None, None)
