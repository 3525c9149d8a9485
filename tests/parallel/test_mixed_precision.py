"""float16 on real ranks: the same bits on any number of them, with casts around what a CPU has no float16 for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from job.distributed.comm import Comm
from job.training import loss_scale
from tests import synthetic
from tests.parallel.runs import Weights, cut_off, records, run, sha256_of

STEPS, CUT = 7, 5
OVERRIDES = [
    "model.dtype=float16", f"train.max_steps={STEPS}", "train.log_every_steps=1", "checkpoint.every_steps=4",
    "optimizer.momentum=0.5", "optimizer.learning_rate=0.05", "train.average_decay=0.9",
]  # fmt: skip
NETWORK = """
from mxnet.gluon import nn

def small(classes):
    net = nn.HybridSequential()
    net.add(nn.Conv2D(4, 5, strides=2), nn.BatchNorm(), nn.Activation("relu"), nn.MaxPool2D())  # 4x6x6
    net.add(nn.Dense(16, use_bias=False), nn.BatchNorm(), nn.Activation("relu"), nn.Dropout(0.25), nn.Dense(classes))
    return net
"""


def trained(comm: Comm, folder: str, overrides: list[str], resume: str = "never", cut: int = STEPS) -> Weights:
    """With a scale that overflows in its first steps, and soon grows again. Cut off as step ``cut`` begins."""
    before = loss_scale.FIRST, loss_scale.GROWTH_INTERVAL
    loss_scale.FIRST, loss_scale.GROWTH_INTERVAL = 2.0**19, 2
    try:
        if cut == STEPS:
            return run(comm, folder, overrides, resume)
        cut_off(comm, folder, overrides, cut)
        return {}
    finally:
        loss_scale.FIRST, loss_scale.GROWTH_INTERVAL = before


def resumed_and_compressed(comm: Comm, folder: str, overrides: list[str]) -> dict[str, Weights]:
    """The run that three ranks have begun, to its end; then runs whose gradients are summed in float16."""
    compressed = [*overrides, "train.fp16_allreduce=true"]
    weights = {"exact": trained(comm, f"{folder}/cut", overrides, "auto")}
    weights["whole"] = trained(comm, f"{folder}/compressed", compressed)
    trained(comm, f"{folder}/compressed-and-cut", compressed, cut=CUT)
    weights["cut"] = trained(comm, f"{folder}/compressed-and-cut", compressed, "auto")
    return weights


def whole_and_cut_off(comm: Comm, folder: str, overrides: list[str]) -> Weights:
    trained(comm, f"{folder}/cut", overrides, cut=CUT)
    return trained(comm, f"{folder}/whole", overrides)


class Runs(NamedTuple):
    """By the number of ranks what each rank holds at the end, and where the runs are."""

    folder: Path
    one: Weights
    two: list[dict[str, Weights]]
    three: list[Weights]


@pytest.fixture(scope="module")
def runs(run_ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("float16")
    (folder / "network.py").write_text(NETWORK)
    network = f"model.name={folder / 'network.py'}:small"
    overrides = [*synthetic.write(folder / "data"), *OVERRIDES, network, "data.global_batch=24"]
    three = run_ranks(whole_and_cut_off, 3, folder=str(folder), overrides=overrides)
    two = run_ranks(resumed_and_compressed, 2, folder=str(folder), overrides=overrides)
    return Runs(folder, trained(Comm(), str(folder / "one"), overrides), two, three)


def scales_and_skipped(folder: Path) -> tuple[list[float], list[int]]:
    """After each step."""
    of_training = [record for record in records(folder) if record["split"] == "train"]
    return [record["loss_scale"] for record in of_training], [record["skipped"] for record in of_training]


@pytest.mark.fault(5)
@pytest.mark.fault(6)
def test_one_two_and_three_ranks_learn_the_same_bits_also_when_killed_and_resumed(runs: Runs) -> None:
    found = [*runs.three, *(of_rank["exact"] for of_rank in runs.two)]
    assert {sha256_of(weights) for weights in found} == {sha256_of(runs.one)}
    assert records(runs.folder / "one") == records(runs.folder / "whole") == records(runs.folder / "cut")


def test_steps_that_overflow_are_skipped_and_the_scale_falls_and_grows_again(runs: Runs) -> None:
    scales, skipped = scales_and_skipped(runs.folder / "one")
    assert skipped[0] == 1 and skipped[-1] < STEPS - 2  # some steps overflow, others do not
    assert any(earlier < later for earlier, later in zip(scales, scales[1:]))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_forty_steps_of_the_tutorials_recipe_come_close_to_those_in_float32(tmp_path: Path) -> None:
    accuracy = {}
    for dtype in ("float16", "float32"):
        run(Comm(), str(tmp_path / dtype), [f"model.dtype={dtype}", "train.max_steps=40"])
        accuracy[dtype] = json.loads((tmp_path / dtype / "summary.json").read_text())["test_accuracy"]
    assert accuracy["float16"] == pytest.approx(accuracy["float32"], abs=0.05)


def test_sums_in_float16_repeat_their_bits_on_as_many_ranks_and_come_close_to_exact_ones(runs: Runs) -> None:
    hashes = {sha256_of(of_rank[name]) for of_rank in runs.two for name in ("whole", "cut")}
    assert len(hashes) == 1 and hashes != {sha256_of(runs.one)}
    assert records(runs.folder / "compressed") == records(runs.folder / "compressed-and-cut")
    assert scales_and_skipped(runs.folder / "compressed")[1][0] > 0  # steps overflow, on both ranks alike
    for name, values in runs.one.items():
        np.testing.assert_allclose(runs.two[0]["whole"][name], values, rtol=0, atol=0.05, err_msg=name)
