"""Hostfiles as people and programs write them, and the file and line of what cannot be read."""

from __future__ import annotations

from pathlib import Path

import pytest

from job.errors import UsageError
from launch.hosts.hostfile import Host, parse, read


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("a\nb\n", [Host("a"), Host("b")]),
        ("a slots=4\nb slots=2", [Host("a", 4), Host("b", 2)]),
        ("a:4\nb : 2\n", [Host("a", 4), Host("b", 2)]),
        ("a slots = 4\n", [Host("a", 4)]),
        ("a\tslots=4\n", [Host("a", 4)]),
        ("# all\n\n  \na   # the first\n  b slots=1# the second\n", [Host("a"), Host("b", 1)]),
        ("a\r\nb:2\r\n", [Host("a"), Host("b", 2)]),
        ("job-worker-0.job.ns.svc slots=1\n", [Host("job-worker-0.job.ns.svc", 1)]),
        ("10.0.0.7:2\nuser@node_1\n", [Host("10.0.0.7", 2), Host("user@node_1")]),
    ],
)
def test_every_form_is_read(text: str, hosts: list[Host]) -> None:
    assert parse(text, "hosts") == hosts


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\na:2\n", "hosts:2: a stands in line 1 already"),
        ("a\n\nb slot=2\n", "hosts:3: cannot read 'b slot=2'; write `host`"),
        ("a b\n", "hosts:1: cannot read 'a b'"),
        ("a slots=0\n", "hosts:1: '0' is no number of ranks"),
        ("a slots=-1\n", "hosts:1: '-1' is no number"),
        ("a:many\n", "hosts:1: 'many' is no number"),
        ("a:1.5\n", "hosts:1: '1.5' is no number"),
        ("a slots=\n", "hosts:1: cannot read"),
        ("-oProxyCommand=x\n", "hosts:1: cannot read '-oProxyCommand=x'"),
        ("-l\n", "hosts:1: cannot read '-l'"),
        ("a;reboot\n", "hosts:1: cannot read"),
        ("fe80::1\n", "hosts:1: 'fe80::1' looks like IPv6"),
        ("[fe80::1]:2\n", "looks like IPv6"),
        ("# nothing\n\n", "hosts: names no host"),
        ("", "names no host"),
    ],
)
def test_what_cannot_be_read_is_told_with_file_and_line(text: str, message: str) -> None:
    with pytest.raises(UsageError) as told:
        parse(text, "hosts")
    assert message in str(told.value)


def test_a_mark_of_the_byte_order_is_no_part_of_a_name(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_bytes(b"\xef\xbb\xbfa:2\n")
    assert read(tmp_path / "hosts") == [Host("a", 2)]


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"absent: the hostfile cannot be read: No such file"):
        read(tmp_path / "absent")


def test_a_folder_and_a_binary_file_are_told_from_hostfiles(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Is a directory"):
        read(tmp_path)
    (tmp_path / "binary").write_bytes(bytes(range(128, 256)))
    with pytest.raises(UsageError, match="not a text file"):
        read(tmp_path / "binary")
