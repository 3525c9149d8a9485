"""float16 on real ranks: the same bits on any number of them, with casts around what a CPU has no float16 for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from job.distributed.comm import Comm
from job.training import loss_scale
from tests import synthetic
from tests.parallel.runs import Weights, cut_off, records, run, sha256_of

STEPS, CUT = 7, 4
OVERRIDES = [
    "model.dtype=float16", f"train.max_steps={STEPS}", "train.log_every_steps=1", "checkpoint.every_steps=3",
    "optimizer.momentum=0.5", "optimizer.learning_rate=0.05", "train.average_decay=0.9",
]  # fmt: skip
TINY = "data.global_batch=24"


def trained(comm: Comm, folder: str, overrides: list[str], resume: str = "never", cut: int = STEPS) -> Weights:
    """With a scale that overflows in its first steps, and soon grows again. Cut off as step ``cut`` begins."""
    before = loss_scale.FIRST, loss_scale.GROWTH_INTERVAL
    loss_scale.FIRST, loss_scale.GROWTH_INTERVAL = 2.0**21, 2
    try:
        if cut == STEPS:
            return run(comm, folder, overrides, resume)
        cut_off(comm, folder, overrides, cut)
        return {}
    finally:
        loss_scale.FIRST, loss_scale.GROWTH_INTERVAL = before


def whole_and_cut_off(comm: Comm, folder: str, overrides: list[str]) -> Weights:
    trained(comm, f"{folder}/cut", overrides, cut=CUT)
    return trained(comm, f"{folder}/whole", overrides)


@pytest.mark.fault(5)
@pytest.mark.fault(6)
def test_one_two_and_three_ranks_learn_the_same_bits_also_when_killed_and_resumed(
    run_ranks: Any, tmp_path: Path
) -> None:
    overrides = [*synthetic.write(tmp_path / "data"), TINY, *OVERRIDES]
    of_three = run_ranks(whole_and_cut_off, 3, folder=str(tmp_path), overrides=overrides)
    of_two = run_ranks(trained, 2, folder=str(tmp_path / "cut"), overrides=overrides, resume="auto")
    of_one = trained(Comm(), str(tmp_path / "one"), overrides)
    assert {sha256_of(weights) for weights in [*of_three, *of_two]} == {sha256_of(of_one)}
    found = records(tmp_path / "one")
    assert found == records(tmp_path / "whole") == records(tmp_path / "cut")
    of_training = [record for record in found if record["split"] == "train"]
    scales = [record["loss_scale"] for record in of_training]
    assert of_training[0]["skipped"] == 1 and of_training[-1]["skipped"] < STEPS - 2  # some overflow, others do not
    assert any(earlier < later for earlier, later in zip(scales, scales[1:]))  # and the scale grows again
