"""Imported by launch/cluster.py: the hostfile. Each line is ``host``, ``host slots=N`` or ``host:N``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple, Optional

from job.errors import UsageError

_FORMS = "write `host`, `host slots=N` or `host:N`"
# A name never begins with a dash: ssh would take it for an option.
_LINE = re.compile(
    r"(?P<name>(?:[\w.-]+@)?\w[\w.-]*)(?:\s*:\s*(?P<after_colon>\S+)|\s+slots\s*=\s*(?P<slots>\S+))?", re.ASCII
)


class Host(NamedTuple):
    """A host as ssh knows it, and its ranks: None where the file leaves them to the number of its GPUs."""

    name: str
    slots: Optional[int] = None


def read(file: Path) -> list[Host]:
    """The hosts of a hostfile in their order, which is the order of ranks.

    Raises:
        UsageError: it cannot be read, a line cannot be understood, or it names no host.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UsageError(f"{file}: the hostfile cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{file}: not a text file; {_FORMS}, one a line") from None
    return parse(text, str(file))


def parse(text: str, file: str) -> list[Host]:
    """The hosts in ``text``; ``file`` is what messages call it. Comments and blank lines are left out.

    Raises:
        UsageError: see :func:`read`.
    """
    hosts: dict[str, Host] = {}
    lines: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.partition("#")[0].strip()
        if not words:
            continue
        host = _parse_line(words, f"{file}:{number}")
        if host.name in hosts:
            raise UsageError(
                f"{file}:{number}: {host.name} stands in line {lines[host.name]} already; name it once, with slots=N"
            )
        hosts[host.name], lines[host.name] = host, number
    if not hosts:
        raise UsageError(f"{file}: names no host; {_FORMS}, one a line")
    return list(hosts.values())


def _parse_line(words: str, where: str) -> Host:
    if words.startswith("[") or words.count(":") > 1:
        raise UsageError(f"{where}: {words!r} looks like IPv6, which Horovod's Gloo does not connect over; give a name")
    matched = _LINE.fullmatch(words)
    if not matched:
        raise UsageError(f"{where}: cannot read {words!r}; {_FORMS}")
    slots = matched["after_colon"] or matched["slots"]
    if slots is None:
        return Host(matched["name"])
    if not re.fullmatch(r"[1-9][0-9]{0,3}", slots):
        raise UsageError(f"{where}: {slots!r} is no number of ranks; it takes 1 to 9999")
    return Host(matched["name"], int(slots))
