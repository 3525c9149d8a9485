"""All writers of a run together: who has them, and what a run that fails leaves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from job.distributed.comm import Comm
from job.monitoring.writers import open_writers
from tests.examples import SUMMARY, TEST, TRAIN


class Ranks(Comm):
    def __init__(self, rank: int, size: int) -> None:
        super().__init__()
        self.rank, self.size = rank, size


def test_rank_0_writes_all_four_and_the_summary_only_at_the_end(tmp_path: Path) -> None:
    with open_writers(tmp_path, Ranks(0, 2), 235) as writers:
        for writer in writers:
            writer.write(TEST)
        assert sorted(file.name for file in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]
        for writer in writers:
            writer.finish(SUMMARY)
    assert json.loads((tmp_path / "summary.json").read_text()) == SUMMARY
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [TEST]


def test_a_run_that_fails_leaves_its_metrics_and_no_summary(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), open_writers(tmp_path, Comm(), 235) as writers:
        for writer in writers:
            writer.write(TRAIN)
        raise ZeroDivisionError
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == TRAIN
    assert EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("train/loss")[0].step == 10
    assert not (tmp_path / "summary.json").exists()


@pytest.mark.parametrize("rank", [1, 3])
def test_other_ranks_write_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str], rank: int) -> None:
    with open_writers(tmp_path, Ranks(rank, 4), 235) as writers:
        assert writers == []
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")
