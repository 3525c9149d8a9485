"""What TensorBoard costs: the time in it beside that of the run, as train.py makes it. About two minutes.

    python -m benchmarks.tensorboard_cost [arguments of train.py]

A run of the default configuration on 2 ranks, with the time of rank 0 inside the TensorBoard writer added up: its
import, every record, picture and histogram, the projector, the end. The other ranks wait meanwhile, so that it is all
that the run would be shorter by. What gathers the ranks' pace is counted too, with the waiting for the slower one. What
comes once a run is told apart from what comes with its steps.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections import defaultdict
from typing import Any

from job.distributed.placement import placement, share_cores

if placement().size > 1:  # not the process that launches the ranks, which would hand all cores on to each of them
    share_cores()

from benchmarks.runs import as_ranks

RANKS = 2
_ONCE, _ALONG = ("import", "__init__", "finish", "close"), ("write", "gather")  # _draw and _add_histograms are in write


def main() -> None:
    """Without a launcher start the run; as a rank, train and measure."""
    if placement().size > 1:
        _measure(sys.argv[1:])
        return
    with tempfile.TemporaryDirectory() as folder:
        arguments = [f"run.dir={folder}/run", *sys.argv[1:]]
        print("\n".join(as_ranks("benchmarks.tensorboard_cost", RANKS, arguments)))


def _measure(arguments: list[str]) -> None:
    from job.distributed.comm import connect
    from job.training import learner  # noqa: F401  (what training needs anyway is not TensorBoard's)

    seconds: dict[str, float] = defaultdict(float)
    began = time.perf_counter()
    from job.monitoring.tensorboard import TensorBoard

    seconds["import"] = time.perf_counter() - began
    from job.cli import parse
    from job.train import train
    from job.training.pace import Pace

    for owner, names in ((TensorBoard, ("__init__", "write", "_draw", "_add_histograms", "finish", "close")),
                         (Pace, ("gather",))):  # fmt: skip
        for name in names:
            _account(owner, name, seconds)
    config = parse(arguments)
    comm = connect(config.run.step_timeout_seconds)
    config.run.dir.mkdir(parents=True, exist_ok=True)
    comm.barrier("ready")
    began = time.perf_counter()
    train(config, comm)
    comm.barrier("trained")
    total = time.perf_counter() - began + seconds["import"]
    if comm.rank == 0:
        along = sum(seconds[name] for name in _ALONG)
        once = sum(seconds[name] for name in _ONCE)
        for name, value in seconds.items():
            print(f"row: {name.strip('_'):>16} {value:7.3f} s", flush=True)
        print(f"row: once a run {once:.2f} s, with its steps {along:.2f} s: {along / (total - once):.2%} of these")
        print(
            f"row: TensorBoard took {once + along:.2f} s of a run of {total:.1f} s on {RANKS} ranks:"
            f" {(once + along) / total:.2%}"
        )
    comm.close()


def _account(owner: Any, name: str, seconds: dict[str, float]) -> None:
    whole = getattr(owner, name)

    def timed(*arguments: Any, **options: Any) -> Any:
        began = time.perf_counter()
        try:
            return whole(*arguments, **options)
        finally:
            seconds[name] += time.perf_counter() - began

    setattr(owner, name, timed)


if __name__ == "__main__":
    main()
