"""A run that was stopped and goes on learns what the run never stopped learns: on the CPU to the last bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from job.checkpoints.store import decode_arrays, read
from job.data.sampler import Shard
from job.distributed.comm import Comm
from job.training.learner import Learner
from tests import synthetic
from tests.parallel.runs import cut_off, cut_off_at, ranks_of, records, run, sha256_of

STEPS = 18  # 3 epochs of 6; checkpoints after 5, 6, 10, 12, 15 and 18; records after 4, 6, 8, 12, 16, 18
OVERRIDES = [
    "train.epochs=3", "train.log_every_steps=4", "checkpoint.every_steps=5", "checkpoint.keep=9",
    "optimizer.learning_rate=0.05",
]  # fmt: skip
# step at which the run is cut off: the step of the checkpoint that it goes on from
CUTS = {3: 0, 8: 6, 9: 6, 12: 12, 16: 15, 17: 15}
SETTINGS = {
    "sgd": [],
    "momentum, cosine, augmented, validated, averaged": [
        "optimizer.momentum=0.9", "schedule.name=cosine", "schedule.warmup_epochs=1", "data.augment.crop_padding=2",
        "data.augment.horizontal_flip=true", "data.validation_fraction=0.1", "train.average_decay=0.9",
    ],
    "adam, micro-batches, clipped": [
        "optimizer.name=adam", "optimizer.learning_rate=0.001", "train.accumulate_steps=2",
        "train.clip_gradient_norm=1.0",
    ],
    "float64": ["model.dtype=float64", "model.dense_batch_norm=true", "optimizer.momentum=0.9"],
}  # fmt: skip


def whole_and_cut_off_runs(comm: Comm, folder: str, overrides: list[str], cuts: list[int]) -> dict[str, Any]:
    weights = {"whole": run(comm, f"{folder}/whole", overrides)}
    for cut in cuts:
        cut_off(comm, f"{folder}/{cut}", overrides, cut)
        weights[str(cut)] = run(comm, f"{folder}/{cut}", overrides, "auto")
    return weights


def final_state(folder: Path) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Every array of the last checkpoint as bytes, and the rest of it without what a clock has measured."""
    final = read(folder / "checkpoints" / f"step-{STEPS:08d}")
    parts = json.loads(final.state)["parts"]
    for measured in ("train_seconds", "window_seconds"):
        del parts["records"][measured]
    return {name: array.tobytes() for name, array in decode_arrays(final.arrays).items()}, parts


@pytest.mark.fault(5)
@pytest.mark.parametrize(
    ("ranks", "setting"),
    [
        (1, "sgd"),
        (1, "adam, micro-batches, clipped"),
        (2, "momentum, cosine, augmented, validated, averaged"),
        (2, "float64"),
        (4, "sgd"),
    ],
)
def test_a_run_that_goes_on_is_bit_for_bit_the_run_never_stopped(
    run_ranks: Any, tmp_path: Path, capfd: Any, ranks: int, setting: str
) -> None:
    overrides = [*synthetic.write(tmp_path / "data"), *OVERRIDES, *SETTINGS[setting]]
    results = run_ranks(whole_and_cut_off_runs, ranks, folder=str(tmp_path), overrides=overrides, cuts=list(CUTS))
    arrays, values = final_state(tmp_path / "whole")
    assert values["progress"]["steps"] == STEPS
    assert any(name.startswith("optimizer/") for name in arrays) == (setting != "sgd")
    for cut in CUTS:
        assert records(tmp_path / str(cut)) == records(tmp_path / "whole"), cut
        assert final_state(tmp_path / str(cut)) == (arrays, values), cut
        for weights in results:
            assert {n: w.tobytes() for n, w in weights[str(cut)].items()} == {
                name.partition("/")[2]: value for name, value in arrays.items() if name.startswith("network/")
            }


@pytest.mark.fault(6)
@pytest.mark.parametrize(("before", "after"), [(2, 1), pytest.param(2, 3, marks=pytest.mark.slow), (1, 4)])
def test_with_another_number_of_ranks_it_is_bit_for_bit_the_run_never_stopped(
    run_ranks: Any, tmp_path: Path, before: int, after: int
) -> None:
    overrides = [*synthetic.write(tmp_path / "data"), *OVERRIDES, "optimizer.momentum=0.5"]
    whole = run_ranks(run, before, folder=str(tmp_path / "whole"), overrides=overrides)
    run_ranks(cut_off, before, folder=str(tmp_path / "cut"), overrides=overrides, step=17)
    resumed = run_ranks(run, after, folder=str(tmp_path / "cut"), overrides=overrides, resume="auto")
    assert {sha256_of(weights) for weights in resumed} == {sha256_of(whole[0])}
    assert (ranks_of(tmp_path / "whole"), ranks_of(tmp_path / "cut")) == ({before}, {before, after})
    assert records(tmp_path / "cut") == records(tmp_path / "whole")
    assert final_state(tmp_path / "cut") == final_state(tmp_path / "whole")


def shares(comm: Comm, folder: str, overrides: list[str], step: int, resume: str) -> list[list[int]]:
    """The samples that this rank trains on, step by step; those of a step that was lost do not count."""
    whole, seen = Learner.step, []

    def noted(self: Learner, split: Any, micros: list[list[Shard]], *arguments: Any) -> None:
        seen.append([self.steps, *(sample for shards in micros for shard in shards for sample in shard.samples)])
        whole(self, split, micros, *arguments)

    Learner.step = noted  # type: ignore[method-assign]
    try:
        with cut_off_at(step):
            run(comm, folder, overrides, resume)
    finally:
        Learner.step = whole  # type: ignore[method-assign]
    return seen


@pytest.mark.fault(6)
def test_no_sample_is_skipped_or_repeated_when_the_number_of_ranks_changes(run_ranks: Any, tmp_path: Path) -> None:
    overrides = [*synthetic.write(tmp_path / "data"), *OVERRIDES]
    common = {"folder": str(tmp_path / "run"), "overrides": overrides}
    first = run_ranks(shares, 2, **common, step=11, resume="never")
    second = run_ranks(shares, 3, **common, step=STEPS, resume="auto")
    taken = [row for rank in first for row in rank if row[0] < 10] + [row for rank in second for row in rank]
    for epoch in range(3):
        samples = [sample for step, *samples in taken if step // 6 == epoch for sample in samples]
        assert sorted(samples) == list(range(synthetic.TRAIN))
