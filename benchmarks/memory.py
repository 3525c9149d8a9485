"""What memory a rank takes, by part, as the parts come: ``python -m benchmarks.memory [--ranks 2]``, half a minute.

Resident memory (RSS) counts a page in full for each rank that has it; proportional memory (PSS) divides it by the
number of processes that share it. So a part of which PSS grows less than RSS is shared between the ranks. Both are of
rank 0, from ``/proc/self/smaps_rollup``, while all ranks stand at the same place.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from job.distributed.placement import placement, share_cores
from job.quick_import import quicken

if placement().size > 1:  # not the process that launches the ranks, which would hand all cores on to each of them
    share_cores()
    quicken()

from benchmarks.runs import as_ranks

STEPS = 20


def main() -> None:
    """Without a launcher start the ranks; as a rank, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="at least 2")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if placement().size > 1:
        _measure(Path(options.folder))
        return
    with tempfile.TemporaryDirectory() as folder:
        rows = as_ranks("benchmarks.memory", options.ranks, ["--folder", folder])
    print(f"| {options.ranks} ranks, MB a rank | RSS grows by | PSS grows by |\n|---|---|---|")
    print("\n".join(rows))


def _measure(folder: Path) -> None:
    parts = [("interpreter", _memory())]

    def mark(part: str, wait: Callable[[], None] = lambda: None) -> None:
        wait()  # until every rank has it, and then until every rank has looked
        parts.append((part, _memory()))
        wait()

    import numpy as np

    mark("import of numpy")
    import mxnet as mx

    mark("import of MXNet")
    import numba  # noqa: F401

    mark("import of numba")
    from job import memory
    from job.config import load_config
    from job.data.sampler import own_shards
    from job.distributed.comm import connect
    from job.monitoring.recorder import Recorder
    from job.monitoring.tensorboard import Subject
    from job.monitoring.writers import open_writers
    from job.train import new_learner, open_data

    mark("other imports: TensorBoard, pydantic, Pillow")
    config = load_config(overrides=[f"run.dir={folder}"])
    comm = connect(60.0)
    mark("Horovod, and the ranks joined", comm.barrier)
    dataset, sampler, config = open_data(config, comm)
    for split in (dataset.train, dataset.test):
        np.asarray(split.images).max()  # so that every page is there
    mark("data", comm.barrier)
    learner = new_learner(config, comm, mx.cpu(), dataset.about)
    mx.nd.waitall()
    mark("network and optimizer", comm.barrier)
    own = own_shards(comm.rank, comm.size, config.data.shards)
    memory.settle()  # as train() does
    for step in range(STEPS):
        batch = sampler.shards(*divmod(step, sampler.steps_per_epoch), own, config.data.shards)
        learner.step(dataset.train, [batch], len(sampler.batch(step)), 0.01, measure=step + 1 == STEPS)
        if step == 0:
            mark("first step: compiled loops, activations, gradients", comm.barrier)
    mark(f"{STEPS - 1} more steps", comm.barrier)
    recorder = Recorder(ranks=comm.size)
    with ExitStack() as stack:
        subject = Subject(config, learner, dataset)
        recorder.writers = stack.enter_context(open_writers(folder, comm, STEPS, 0, subject))
        recorder.train(STEPS, 0, learner.totals(), 0.01, **learner.vitals())
        recorder.test(STEPS, 0, learner.evaluate(dataset.test, config.data.test_batch_per_rank))
    mark("evaluation, and TensorBoard on rank 0", comm.barrier)
    if comm.rank == 0:
        before = (0.0, 0.0)
        for part, now in parts:
            print(f"row:| {part} | {now[0] - before[0]:.0f} | {now[1] - before[1]:.0f} |", flush=True)
            before = now
        print(f"row:| all | {before[0]:.0f} | {before[1]:.0f} |", flush=True)
    comm.close()


def _memory() -> tuple[float, float]:
    """RSS and PSS of this process in MB."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    kilobytes = {name: int(value.split()[0]) for name, _, value in (line.partition(":") for line in lines)}
    return kilobytes["Rss"] / 1000, kilobytes["Pss"] / 1000


if __name__ == "__main__":
    main()
