"""A rank that is slow stands out in what a run records, and so do those that wait for it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from job.comm import Comm
from job.config import load_config
from job.steps import Feed
from job.train import train
from tests import synthetic

DELAY = 0.3  # seconds; a step takes a tenth of it


def slowed(comm: Comm, folder: str, overrides: list[str], slow: int) -> None:
    """Train, with a data feed that is slow on one rank."""
    whole = Feed.__call__

    def late(self: Feed, *arguments: Any) -> Any:
        time.sleep(DELAY if comm.rank == slow else 0)
        return whole(self, *arguments)

    Feed.__call__ = late  # type: ignore[method-assign]
    config = load_config(overrides=[f"run.dir={folder}", *overrides])
    config.run.dir.mkdir(exist_ok=True)
    train(config, comm)


@pytest.mark.parametrize(("ranks", "slow"), [(2, 1), (3, 0)])
@pytest.mark.parametrize("setting", ["model.sync_batch_norm=true", "model.sync_batch_norm=false"])
def test_a_slow_rank_has_the_own_time_and_the_others_have_the_wait(
    run_ranks: Any, tmp_path: Path, ranks: int, slow: int, setting: str
) -> None:
    overrides = [*synthetic.write(tmp_path / "data"), setting, "train.epochs=2", "train.log_every_steps=3"]
    run_ranks(slowed, ranks, folder=str(tmp_path / "run"), overrides=overrides, slow=slow)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    paces = [record["pace"] for record in lines if record["split"] == "train"][1:]  # the first compiles loops
    assert len(paces) == 3
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    for place, pace in enumerate(paces, start=1):
        own, waited = pace["compute_seconds"], pace["wait_seconds"]
        for rank in range(ranks):
            assert events.Scalars(f"ranks/compute_seconds/{rank}")[place].value == pytest.approx(own[rank], rel=1e-6)
            if rank != slow:
                assert own[slow] > own[rank] + DELAY / 2
                assert waited[rank] > waited[slow] + DELAY / 2
                assert pace["images_per_second"][rank] > pace["images_per_second"][slow]
