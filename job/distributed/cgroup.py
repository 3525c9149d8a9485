"""What the container or the scheduler leaves to this process: the limits of its control groups, version 1 or 2.

A machine of 64 cores whose container may use two is one of two cores, and nothing but these files says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_UNLIMITED = 1 << 60  # version 1 says "no limit" with a number of about 2**63


def cpu_quota(root: Path = Path("/")) -> float | None:
    """How many cores' worth of time this process may use; None without a limit. ``root`` is for tests."""
    quotas = []
    for folder in _folders("cpu", root):
        quota, period = [*_read(folder / "cpu.max").split(), "", ""][:2]
        quota = quota or _read(folder / "cpu.cfs_quota_us")
        period = period or _read(folder / "cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit() and int(period):  # "max", and -1 in version 1, mean no limit
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def memory_limit(root: Path = Path("/")) -> int | None:
    """How many bytes of memory this process and its neighbours in the group may use; None without a limit."""
    limits = []
    for folder in _folders("memory", root):
        limit = _read(folder / "memory.max") or _read(folder / "memory.limit_in_bytes")
        if limit.isdigit() and int(limit) < _UNLIMITED:
            limits.append(int(limit))
    return min(limits, default=None)


def _folders(controller: str, root: Path) -> Iterator[Path]:
    """The group's folder and those above it, each of which limits it.

    In a container the path may be that of the host, of which only the last folder can be seen, as the root.
    """
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers in ("", controller) or controller in controllers.split(","):
            mount = root / "sys/fs/cgroup" / controllers
            folder = mount / path.lstrip("/")
            yield folder
            yield from (above for above in folder.parents if above == mount or mount in above.parents)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""
