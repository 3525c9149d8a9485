"""What it brings to sum gradients in buckets, beside backward: ``python -m benchmarks.buckets [sums] [steps]``.

``sums`` takes two minutes: how long a sum over 2, 4 and 8 ranks of this machine takes by its size, through the memory
that they share and through Horovod, while nothing else is computed. ``steps`` takes a quarter of an hour: a step of
large networks of MXNet's model zoo on two ranks, with one sum after backward, and with buckets. Whatever is compared
takes turns in one process, so that what else the machine does meets all of it. The intervals are those of
:mod:`benchmarks.step_time`.
"""

from __future__ import annotations

import sys
import time
from functools import partial
from unittest import mock

from job.distributed.placement import placement, share_cores

if placement().size > 1:  # not the process that launches the ranks, which would hand all cores on to each of them
    share_cores()

import numpy as np

from benchmarks.intervals import median, ratio
from benchmarks.runs import as_ranks
from benchmarks.step_time import WARMUP_TURNS, measure
from job.config import load_config
from job.data.dataset import Description, Split
from job.distributed import shared_sums
from job.distributed.comm import Comm, HorovodComm, connect
from job.distributed.device import choose_device
from job.train import new_learner
from job.training.learner import Learner
from job.training.step_sums import StepSums

RANKS, SUMMING_RANKS = 2, (2, 4, 8)
TURNS, STEPS_A_TURN = 10, 1
MEGABYTES = (0.25, 1, 2, 4, 8, 16, 32, 64)
BUCKETS_MEGABYTES = (8, 32)
WHOLE = 2**40  # bytes of a bucket that no network fills
WAYS: list[tuple[str, list[str], list[str]]] = [
    ("on one machine, MPI", [], []),
    ("as if on two, Gloo", ["apart"], ["--gloo"]),
]
NETWORKS = {"resnet18_v1": 64, "resnet50_v1": 64}  # pixels of a side
GLOBAL_BATCH = 32


def main(arguments: list[str]) -> None:
    """Without a launcher start the ranks; as one of them, measure."""
    if placement().size > 1:
        comm = connect(60.0, share_memory="apart" not in arguments)
        if arguments[0] == "sums":
            _sums(comm)
        else:
            _steps(comm, arguments[0])
        comm.close()
        return
    if not arguments or "sums" in arguments:
        print(f"{TURNS} turns: median sum of int64 in ms, ratio of the medians with its 90% interval")
        print(
            "| ranks | by | MB | shared memory | Horovod | Horovod / shared | 90% interval |" + "\n" + "|---" * 7 + "|"
        )
        for ranks in SUMMING_RANKS:
            for controller, options in (("MPI", []), ("Gloo", ["--gloo"])):
                for row in as_ranks("benchmarks.buckets", ranks, ["sums"], options):
                    print(f"| {ranks} | {controller} {row}", flush=True)
    if not arguments or "steps" in arguments:
        print(f"\n{RANKS} ranks, global batch {GLOBAL_BATCH}, {TURNS} turns of {STEPS_A_TURN} steps: median step in ms")
        print("| network | ranks | buckets | ms | ratio to one | 90% interval |" + "\n" + "|---" * 6 + "|")
        for network in NETWORKS:
            for way, given, options in WAYS:
                for row in as_ranks("benchmarks.buckets", RANKS, [network, *given], options):
                    print(f"| {network} | {way} {row}", flush=True)


def _sums(comm: Comm) -> None:
    shared_sums._LARGEST_BYTES = 2**40
    horovod = HorovodComm(60.0, share_memory=False)
    for megabytes in MEGABYTES:
        values = np.ones(round(megabytes * 2**17), np.int64)
        taken = np.empty((WARMUP_TURNS + TURNS, 2))
        for turn in taken:
            for way, of in enumerate((comm, horovod)):
                comm.barrier()
                started = time.perf_counter()
                of.sum(values, f"{megabytes} MB of way {way}")
                turn[way] = (time.perf_counter() - started) * 1e3
        shared, by_horovod = taken[WARMUP_TURNS:].T
        value, low, high = ratio(by_horovod, shared)
        medians = f"{np.median(shared):.2f} | {np.median(by_horovod):.2f}"
        _tell(comm, f"| {megabytes:g} | {medians} | {value:.2f} | {low:.2f} to {high:.2f} |")


def _steps(comm: Comm, network: str) -> None:
    pixels = NETWORKS[network]
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (8 * GLOBAL_BATCH, 3, pixels, pixels), dtype=np.uint8)
    split = Split(images, random.integers(0, 10, len(images)))
    about = Description(tuple("0123456789"), images.shape[1:])
    sizes = [WHOLE, *(megabytes * 2**20 for megabytes in BUCKETS_MEGABYTES)]
    learners = [_learner(comm, network, about, bucket_bytes) for bucket_bytes in sizes]
    step_ms = measure(comm, learners, split, GLOBAL_BATCH, 8, TURNS, STEPS_A_TURN)[WARMUP_TURNS:]
    for learner, bucket_bytes, own in zip(learners, sizes, step_ms.T):
        value, low, high = ratio(own, step_ms[:, 0])
        buckets = len(learner._sums._buckets)
        name = "one" if bucket_bytes == WHOLE else f"{buckets} of {bucket_bytes // 2**20} MB or more"
        _tell(comm, f"| {name} | {median(own).value:.0f} | {value:.3f} | {low:.2f} to {high:.2f} |")


def _learner(comm: Comm, network: str, about: Description, bucket_bytes: int) -> Learner:
    overrides = [f"model.name={network}", f"data.global_batch={GLOBAL_BATCH}"]
    with mock.patch("job.training.learner.StepSums", partial(StepSums, bucket_bytes=bucket_bytes)):
        return new_learner(load_config(overrides=overrides), comm, choose_device("cpu", comm), about)


def _tell(comm: Comm, row: str) -> None:
    if comm.rank == 0:
        print(f"row:{row}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
