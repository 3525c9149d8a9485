"""How a step would go on more ranks than we have: a model, and its test on this machine (docs/scaling.md).

    python -m benchmarks.scaling [measure] [draw]

``measure`` takes two minutes: it calibrates MPI and Gloo with 1, 2, 4 and 8 ranks on this machine's cores, and
measures steps of the same ranks. ``draw`` holds the model against them. It also makes docs/images/scaling.png and
the tables for 8 to 1,024 GPUs, from published figures of NCCL and of ResNet-50.

The model: a step is its arithmetic, then two sums over ranks for each BatchNorm, then one for the gradients, one after
the other, without overlap. A sum takes a latency, and 2 (p - 1) / p times its bytes over the bandwidth (Thakur,
Rabenseifner and Gropp, 2005).
"""

from __future__ import annotations

import json
import math
import sys
import time
from dataclasses import dataclass
from typing import Any

from job.distributed.placement import share_cores

if sys.argv[1:] == ["rank"]:  # not the process that launches the ranks, which would hand all cores on to each
    share_cores()

import numpy as np

from benchmarks.runs import IMAGES, ROOT, as_ranks

RESULT = ROOT / "benchmarks" / "results" / "scaling.json"
RANKS = (8, 16, 32, 64, 128, 256, 512, 1024)
SMALL, LARGE = 16, 180_000  # float64 values of the sums that calibrate


@dataclass(frozen=True)
class Network:
    """What of a network matters here: ``channels`` of each of its BatchNorms, and how many parameters."""

    name: str
    channels: tuple[int, ...]
    parameters: int


TUTORIAL = Network("the tutorial's network", (20, 50), 171_128)
# He et al., 2016, table 1: the first layer, then of each bottleneck block two of width w and one of 4 w, and one of
# each shortcut that is projected.
_WIDTHS = tuple(w for w, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)) for w in (w,) * blocks)
_PROJECTED = (256, 512, 1024, 2048)
RESNET50 = Network("ResNet-50", (64, *(c for w in _WIDTHS for c in (w, w, 4 * w)), *_PROJECTED), 25_557_032)


@dataclass(frozen=True)
class Nccl:
    """NCCL on nodes of eight A100, as published.

    Latency: NCCL's own tuning model, src/graph/tuning.cc (tree, LL): 4.4 us, 0.52 us a hop over NVLink (times 1.8
    beside a network), 5 us a level of the tree over InfiniBand, up and down. Bandwidth: its limit for A100 in a node,
    235 GB/s; over four HDR cards 84.8 GB/s, as measured with 24 A100 (github.com/NVIDIA/nccl-tests/issues/119).
    """

    per_node: int = 8
    cycle_seconds: float = 0.0001  # Horovod looks for work so often; a sum waits for half of it, on average

    def sum_seconds(self, ranks: int, bytes_: float) -> float:
        """Of one sum over so many ranks, by Horovod."""
        if ranks == 1:
            return 0.0
        nodes = math.ceil(ranks / self.per_node)
        hops = min(ranks, self.per_node) - 1
        latency = 4.4e-6 + 2 * (hops * 0.52e-6 * (1.8 if nodes > 1 else 1.0) + math.log2(nodes) * 5e-6)
        bandwidth = 235e9 if nodes == 1 else 84.8e9
        return self.cycle_seconds / 2 + latency + transfer_seconds(ranks, bytes_, bandwidth)


@dataclass(frozen=True)
class Measured:
    """A way that was calibrated here: for each number of ranks the seconds of a sum of SMALL and of LARGE values."""

    points: dict[int, tuple[float, float]]

    def sum_seconds(self, ranks: int, bytes_: float) -> float:
        """Of one sum, on the line through the two that were measured."""
        if ranks == 1:
            return 0.0
        small, large = self.points[ranks]
        slope = max(large - small, 0.0) / (8.0 * (LARGE - SMALL))
        return small + slope * max(bytes_ - 8.0 * SMALL, 0.0)


def transfer_seconds(ranks: int, bytes_: float, bytes_per_second: float) -> float:
    """What a ring takes for the bytes alone: each rank sends all of them twice, but for its own part."""
    return 2 * (ranks - 1) / ranks * bytes_ / bytes_per_second


@dataclass(frozen=True)
class Step:
    """Seconds of a step, by what takes them."""

    compute: float
    statistics: float
    gradients: float

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.compute + self.statistics + self.gradients

    @property
    def efficiency(self) -> float:
        """Images a second and rank beside those of a rank that never communicates."""
        return self.compute / self.seconds


def statistics_bytes(channels: int, shards: int) -> tuple[float, float]:
    """Of a BatchNorm's table: forward 2 C + 1 float64 a shard, backward 2 C."""
    return 8.0 * shards * (2 * channels + 1), 8.0 * shards * 2 * channels


def step(network: Network, ranks: int, shards: int, compute: float, way: Any, group: int | None = None) -> Step:
    """A step of ``shards`` shards that share statistics, in groups of ``group`` shards if that is given.

    With one shard a rank, a group is as many ranks as shards, and never more than all of them.
    """
    sharing, rows = (ranks, shards) if group is None else (min(group * ranks // shards, ranks) or 1, min(group, shards))
    statistics = sum(
        way.sum_seconds(sharing, bytes_) for channels in network.channels for bytes_ in statistics_bytes(channels, rows)
    )
    return Step(compute, statistics, way.sum_seconds(ranks, 8.0 * network.parameters))  # gradients are int64


def main(arguments: list[str]) -> None:
    """As rank, measure; otherwise what was asked for."""
    if arguments == ["rank"]:
        _measure_rank()
        return
    if not arguments or "measure" in arguments:
        _measure()
    if not arguments or "draw" in arguments:
        _draw()


def _measure() -> None:
    RESULT.parent.mkdir(exist_ok=True)
    found: dict[str, Any] = {"MPI": {}, "Gloo": {}}
    for way, options in (("MPI", []), ("Gloo", ["--gloo"])):
        for ranks in (1, 2, 4, 8):
            (row,) = as_ranks("benchmarks.scaling", ranks, ["rank"], options)
            found[way][ranks] = json.loads(row)
            print(f"{way}, {ranks} ranks: {row}", file=sys.stderr, flush=True)
            RESULT.write_text(json.dumps(found, indent=1) + "\n")


def _measure_rank() -> None:
    import mxnet as mx

    from job.config import load_config
    from job.data import idx
    from job.data.sampler import Sampler, own_shards
    from job.distributed.comm import connect
    from job.distributed.device import choose_device
    from job.train import new_learner

    comm = connect(60.0, share_memory=False)
    sums = []
    for size in (SMALL, LARGE):
        values, taken = np.zeros(size), []
        for _ in range(30):
            started = time.perf_counter()
            comm.sum(values, f"size.{size}")
            taken.append(time.perf_counter() - started)
        sums.append(float(np.median(taken[5:])))
    config = load_config()
    dataset = idx.load(config.data)
    learner = new_learner(config, comm, choose_device("cpu", comm), dataset.about)
    sampler, shards = Sampler(len(dataset.train.labels), 256, 0), config.data.shards
    own, taken = own_shards(comm.rank, comm.size, shards), []
    for number in range(24):
        comm.barrier()
        started = time.perf_counter()
        learner.step(dataset.train, [sampler.shards(0, number, own, shards)], 256, 0.01)
        mx.nd.waitall()
        taken.append(time.perf_counter() - started)
    if comm.rank == 0:
        print("row:" + json.dumps({"sums": sums, "step": float(np.median(taken[8:]))}), flush=True)
    comm.close()


def check(found: dict[str, Any]) -> list[tuple[str, int, float, float]]:
    """The way, the ranks, and the step in seconds as the model has it and as it was measured.

    The arithmetic is that of one rank on all cores, which more ranks share. So one rank fits by definition.
    """
    rows = []
    for name, points in found.items():
        way = Measured({int(ranks): tuple(point["sums"]) for ranks, point in points.items()})
        compute = points["1"]["step"]
        for ranks, point in points.items():
            predicted = step(TUTORIAL, int(ranks), 8, compute, way)
            rows.append((name, int(ranks), predicted.seconds, point["step"]))
    return rows


# Images a second of one A100 in TF32 with MXNet: NVIDIA/DeepLearningExamples, MxNet/Classification/RN50v1.5, README.
A100_RESNET50 = 1022.0
IMAGES_A_RANK = 32
TUTORIAL_SECONDS = 0.001  # for 32 images on a GPU: assumed, not measured and not published; launches of kernels


def _draw() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    if RESULT.exists():
        print("| way | ranks here | model, ms | measured, ms | model / measured |\n|---|---|---|---|---|")
        for name, ranks, predicted, actual in check(json.loads(RESULT.read_text())):
            print(f"| {name} | {ranks} | {predicted * 1e3:.0f} | {actual * 1e3:.0f} | {predicted / actual:.2f} |")
    figure, axes = plt.subplots(1, 2, figsize=(12, 4), constrained_layout=True, sharey=True)
    for axis, network, compute in (
        (axes[0], TUTORIAL, TUTORIAL_SECONDS),
        (axes[1], RESNET50, IMAGES_A_RANK / A100_RESNET50),
    ):
        print(f"\n{network.name}, {IMAGES_A_RANK} images a GPU, ms a step")
        print(
            "| GPUs | arithmetic | statistics | gradients | efficiency | with groups of 8 shards |\n" + "|---" * 6 + "|"
        )
        steps, groups = [], []
        for ranks in RANKS:
            steps.append(step(network, ranks, ranks, compute, Nccl()))
            groups.append(step(network, ranks, ranks, compute, Nccl(), group=8))
            one = steps[-1]
            parts = " | ".join(f"{part * 1e3:.2f}" for part in (one.compute, one.statistics, one.gradients))
            print(f"| {ranks:,} | {parts} | {one.efficiency:.0%} | {groups[-1].efficiency:.0%} |")
        axis.plot(RANKS, [one.efficiency for one in steps], "o-", label="statistics of all shards")
        axis.plot(RANKS, [one.efficiency for one in groups], "s--", label="of groups of 8 shards")
        alone = [one.compute / (one.compute + one.gradients) for one in steps]
        axis.plot(RANKS, alone, ":", color="gray", label="of each shard on its own")
        axis.set(
            title=f"{network.name}, {IMAGES_A_RANK} images a GPU: a model", xlabel="GPUs", xscale="log", ylim=(0, 1)
        )
        axis.set_xticks(RANKS, [str(ranks) for ranks in RANKS])
        axis.minorticks_off()
        axis.legend()
    axes[0].set_ylabel("efficiency")
    IMAGES.mkdir(parents=True, exist_ok=True)
    figure.savefig(IMAGES / "scaling.png", dpi=110)


if __name__ == "__main__":
    main(sys.argv[1:])
