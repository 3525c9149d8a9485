"""A rank that is slow stands out in what a run records, and so do those that wait for it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from job.config import load_config
from job.distributed.comm import Comm
from job.train import train
from job.training.feed import Feed
from tests import synthetic

DELAY = 1.5  # seconds, thirty times what a step takes, and some times what it takes on a busy machine


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


@pytest.mark.parametrize(
    ("ranks", "slow", "setting"),
    [(2, 1, "model.sync_batch_norm=true"), (3, 0, "model.sync_batch_norm=false")],
    ids=["waiting in statistics", "waiting for gradients"],
)
def test_a_slow_rank_has_the_own_time_and_the_others_have_the_wait(
    run_ranks: Any, tmp_path: Path, ranks: int, slow: int, setting: str
) -> None:
    overrides = [*synthetic.write(tmp_path / "data"), setting, "train.max_steps=6", "train.log_every_steps=2"]
    run_ranks(slowed, ranks, folder=str(tmp_path / "run"), overrides=[*overrides, "train.epochs=2"], slow=slow)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    paces = [record["pace"] for record in lines if record["split"] == "train"]
    assert len(paces) == 3
    steady = {name: np.mean([pace[name] for pace in paces[1:]], axis=0) for name in paces[0]}
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    for rank in range(ranks):
        shown = [event.value for event in events.Scalars(f"ranks/compute_seconds/{rank}")]
        assert shown == pytest.approx([pace["compute_seconds"][rank] for pace in paces], rel=1e-6)
        if rank != slow:
            # Not the whole delay: the samples of a step are made ready while the one before it is computed.
            assert steady["compute_seconds"][slow] > steady["compute_seconds"][rank] + DELAY / 4
            assert steady["wait_seconds"][rank] > steady["wait_seconds"][slow] + DELAY / 4
            assert steady["images_per_second"][rank] > steady["images_per_second"][slow]
