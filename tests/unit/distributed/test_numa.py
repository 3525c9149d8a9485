"""Which cores a rank is kept on, on machines whose /sys the test writes; and that all of its threads stay there."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from job.distributed.numa import Cores, near

ROOT = Path(__file__).resolve().parents[3]
SOCKETS = {0: "0-7,16-23", 1: "8-15,24-31"}  # with hyperthreads, as Linux counts them
FIRST, SECOND = Cores([*range(8), *range(16, 24)]), Cores([*range(8, 16), *range(24, 32)])
ALL = FIRST | SECOND


def machine(root: Path, nodes: Mapping[int, str], cards: Mapping[str, str] = {}) -> Path:
    """Of nodes with these lists of cores, and GPUs at these nodes."""
    for number, cores in nodes.items():
        folder = root / f"sys/devices/system/node/node{number}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(f"{cores}\n")
    (root / "sys/devices/system/node/has_cpu").write_text("0-1\n")
    for card, node in cards.items():
        folder = root / "sys/bus/pci/devices" / card
        folder.mkdir(parents=True)
        (folder / "numa_node").write_text(f"{node}\n")
    return root


def chosen(root: Path, cards: Sequence[str], allowed: Cores = ALL) -> list[Cores]:
    return [near(place, cards, [allowed] * len(cards), root) for place in range(len(cards))]


def on_cpus(root: Path, ranks: int, allowed: Cores = ALL) -> list[Cores]:
    return chosen(root, [""] * ranks, allowed)


def test_a_rank_is_kept_at_the_node_of_its_gpu_whatever_its_number(tmp_path: Path) -> None:
    cards = {"0000:1a:00.0": "1", "0000:3b:00.0": "0", "0001:86:00.0": "1", "0001:d8:00.0": "0"}
    root = machine(tmp_path, SOCKETS, cards)
    assert chosen(root, [card.upper() for card in cards]) == [SECOND, FIRST, SECOND, FIRST]  # as CUDA writes them


def test_ranks_are_not_crowded_together_though_their_gpus_are(tmp_path: Path) -> None:
    root = machine(tmp_path, SOCKETS, {"0000:1a:00.0": "0", "0000:3b:00.0": "0", "0000:86:00.0": "1"})
    assert chosen(root, ["0000:1a:00.0", "0000:3b:00.0"]) == [ALL, ALL]
    assert chosen(root, ["0000:1a:00.0"]) == [ALL]
    assert chosen(root, ["0000:1a:00.0", "0000:3b:00.0", "0000:86:00.0"]) == [ALL, ALL, SECOND]


@pytest.mark.parametrize("node", ["-1", "7", "", "no number"], ids=["unknown", "not there", "empty", "text"])
def test_where_the_node_of_a_gpu_is_not_known_nothing_is_bound(tmp_path: Path, node: str) -> None:
    root = machine(tmp_path, SOCKETS, {"0000:1a:00.0": node, "0000:3b:00.0": "1"})
    assert chosen(root, ["0000:1a:00.0", "0000:3b:00.0"]) == [ALL, SECOND]
    assert chosen(root, ["0 of all", "1 of all"]) == [ALL, ALL]  # what CUDA's library could not tell


def test_ranks_on_cpus_share_the_cores_node_by_node_and_keep_hyperthreads_together(tmp_path: Path) -> None:
    root = machine(tmp_path, SOCKETS)
    for core in range(32):
        folder = root / f"sys/devices/system/cpu/cpu{core}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{core % 16},{core % 16 + 16}\n")
    assert on_cpus(root, 1) == [ALL]
    assert on_cpus(root, 2) == [FIRST, SECOND]
    assert on_cpus(root, 4)[:2] == [Cores([*range(4), *range(16, 20)]), Cores([*range(4, 8), *range(20, 24)])]
    assert on_cpus(root, 16)[3] == Cores([3, 19])
    assert sorted(map(len, on_cpus(root, 3))) == [10, 11, 11]
    assert Cores().union(*on_cpus(root, 3)) == ALL
    assert sorted(map(sorted, on_cpus(root, 32))) == [[core] for core in range(32)]
    assert on_cpus(root, 33) == [ALL] * 33  # more than cores


def test_few_ranks_get_several_nodes_each(tmp_path: Path) -> None:
    root = machine(tmp_path, {number: f"{2 * number}-{2 * number + 1}" for number in (10, 2, 0, 1)})
    allowed = Cores([0, 1, 2, 3, 4, 5, 20, 21])
    assert on_cpus(root, 2, allowed) == [Cores([0, 1, 2, 3]), Cores([4, 5, 20, 21])]


def test_cores_that_the_container_does_not_give_are_not_taken(tmp_path: Path) -> None:
    root = machine(tmp_path, SOCKETS, {"0000:1a:00.0": "0"})
    few = Cores([0, 1, 8, 9])
    assert on_cpus(root, 2, few) == [Cores([0, 1]), Cores([8, 9])]
    assert on_cpus(root, 2, Cores([8, 9])) == [Cores([8]), Cores([9])]
    assert chosen(root, ["0000:1a:00.0"], Cores([8, 9])) == [Cores([8, 9])]


def test_a_launcher_that_has_bound_ranks_is_not_corrected(tmp_path: Path) -> None:
    root = machine(tmp_path, SOCKETS, {"0000:1a:00.0": "1"})
    masks = [Cores([0, 8]), Cores([1, 9])]
    assert near(0, ["", ""], masks, root) == masks[0]
    assert near(1, ["0000:1a:00.0", ""], masks, root) == masks[1]


@pytest.mark.parametrize("nodes", [{}, {0: "0-31"}, {0: "0-31", 1: ""}], ids=["no NUMA", "one", "memory alone"])
def test_ranks_on_a_machine_of_one_node_share_its_cores_too(tmp_path: Path, nodes: dict[int, str]) -> None:
    root = tmp_path if not nodes else machine(tmp_path, nodes)
    assert on_cpus(root, 2) == [Cores(range(16)), Cores(range(16, 32))]
    assert chosen(root, ["0000:1a:00.0", "0000:3b:00.0"]) == [ALL, ALL]  # at nodes that nobody knows


def test_all_threads_are_bound_and_the_cores_of_the_machine_are_still_known() -> None:
    program = """
import os, threading
from job.distributed.placement import bind, cores
allowed, found = os.sched_getaffinity(0), []
look, looked = threading.Event(), threading.Event()
def run():
    look.wait(20)
    found.append(os.sched_getaffinity(0))
thread = threading.Thread(target=run)
thread.start()
before, own = cores(), {min(allowed)}
bind(own)
look.set()
thread.join()
assert os.sched_getaffinity(0) == own == found[0], found
assert cores() == before, (cores(), before)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
