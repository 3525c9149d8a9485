"""Which cores a rank stays on: near its GPU, or near one another.

A machine with several sockets is several *NUMA nodes*, each with cores and memory of its own, and with its own GPUs. To
reach what is at another node takes longer. Linux gives a process memory of the node where the thread runs that first
touches it, so that bound cores bind the memory as well. What the nodes are is told by the kernel in /sys, in containers
too: https://docs.kernel.org/admin-guide/mm/numaperf.html.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Optional

Cores = frozenset[int]


def near(place: int, cards: Sequence[str], allowed: Sequence[Cores], root: Path = Path("/")) -> Cores:
    """The cores for a rank: those at the node of its GPU; without a GPU its own share of all cores.

    Threads of several ranks that move over the same cores get in one another's way, and each sum over ranks waits for
    the slowest: two ranks on two cores took a quarter more time for a step.

    All that it may use, where it would lose by that: where the ranks whose GPUs are at that node would have fewer cores
    there than all ranks have on the average; where there are more ranks than cores; or where ranks may use different
    cores, so that a launcher has chosen.

    Args:
        place: of the rank among those of its machine.
        cards: of each of them its GPU, by its place on the PCI bus; empty if it has none.
        allowed: of each of them the cores that it may use.
        root: is for tests.
    """
    own, ranks = allowed[place], len(cards)
    if any(cores != own for cores in allowed):
        return own
    nodes = _nodes(root)
    if cards[place]:
        at = [_node_of(card, root) for card in cards]
        found = dict(nodes).get(at[place], Cores()) & own
        return found if found and len(found) * ranks >= at.count(at[place]) * len(own) else own
    node_of = {core: number for number, cores in nodes for core in cores}
    ordered = sorted(own, key=lambda core: (node_of.get(core) or 0, min(_siblings(core, root)), core))
    share = ordered[len(ordered) * place // ranks : len(ordered) * (place + 1) // ranks]
    return Cores(share) if ranks <= len(own) else own


def _siblings(core: int, root: Path) -> Cores:
    """The hyperthreads of the same core, itself among them."""
    return _cores(root / f"sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list") or Cores([core])


def _nodes(root: Path) -> list[tuple[Optional[int], Cores]]:
    """Their numbers and cores, in the order of the numbers; some have memory alone."""
    folders = (root / "sys/devices/system/node").glob("node[0-9]*")
    return sorted((int(folder.name[4:]), _cores(folder / "cpulist")) for folder in folders)


def _node_of(card: str, root: Path) -> Optional[int]:
    """The number of the node; None where the kernel does not know."""
    try:
        number = int((root / "sys/bus/pci/devices" / card.lower() / "numa_node").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
    return None if number < 0 else number


def _cores(file: Path) -> Cores:
    """Of a list such as ``0-15,32-47``."""
    try:
        parts = [part.partition("-") for part in file.read_text(encoding="ascii").split(",") if part.strip()]
        return Cores(core for first, _, last in parts for core in range(int(first), int(last or first) + 1))
    except (OSError, ValueError):
        return Cores()
