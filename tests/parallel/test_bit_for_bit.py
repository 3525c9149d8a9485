"""The promise, on real ranks, in float32: not one bit of what is learned depends on their number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mxnet.gluon import nn

from job.checkpoints.store import decode_arrays, read
from job.distributed.comm import Comm
from tests import synthetic
from tests.parallel.runs import cut_off, records, run, sha256_of
from tests.parallel.test_training import one_process

SHORT = ["train.epochs=2", "train.log_every_steps=1", "optimizer.learning_rate=0.05"]
SETTINGS = {
    "eight shards": [],
    "one shard": ["data.shards=1"],
    "three shards": ["data.shards=3", "data.global_batch=50"],
    "a batch that shards do not divide": ["data.global_batch=250"],
    "accumulation, clipping, smoothing, adam": [
        "train.accumulate_steps=2", "train.clip_gradient_norm=0.5", "train.label_smoothing=0.1", "optimizer.name=adam",
        "optimizer.learning_rate=0.001",
    ],
    "nesterov, BatchNorm on the dense layer": [
        "optimizer.momentum=0.9", "optimizer.nesterov=true", "model.dense_batch_norm=true",
        "optimizer.weight_decay=0.001",
    ],
    "statistics of groups of three shards": ["model.sync_batch_norm_group=3"],
    "statistics of each shard": ["model.sync_batch_norm=false", "train.accumulate_steps=2"],
    "float64": ["model.dtype=float64"],
    "augmented, validated, averaged": [
        "data.augment.horizontal_flip=true", "data.augment.crop_padding=2", "data.augment.erase_probability=0.5",
        "data.validation_fraction=0.1", "train.average_decay=0.9", "optimizer.momentum=0.9",
    ],
}  # fmt: skip


def with_dropout(classes: int) -> nn.HybridSequential:
    net = nn.HybridSequential()
    net.add(nn.Conv2D(16, 5), nn.BatchNorm(), nn.Activation("relu"), nn.MaxPool2D(), nn.Dropout(0.4))
    net.add(nn.Dense(32, activation="relu"), nn.Dropout(0.3), nn.Dense(classes))
    return net


def outcome(
    run_ranks: Any, folder: Path, ranks: int, overrides: list[str], controller: str = "gloo", **more: Any
) -> Any:
    """One hash for all ranks, and the records."""
    weights = run_ranks(run, ranks, controller, folder=str(folder), overrides=overrides, **more)
    (digest,) = {sha256_of(of_rank) for of_rank in weights}
    assert json.loads((folder / "summary.json").read_text())["weights_sha256"] == digest
    return digest, records(folder)


def runs(comm: Comm, folder: str, overrides: list[str], settings: dict[str, list[str]]) -> dict[str, str]:
    """Several runs by the same processes, which start only once."""
    return {name: sha256_of(run(comm, f"{folder}/{name}", [*overrides, *more])) for name, more in settings.items()}


@pytest.fixture(scope="module")
def by_ranks(run_ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    """Of 1, 2 and 3 ranks the hash and the records of a run with each of the settings."""
    folder = tmp_path_factory.mktemp("settings")
    overrides = [*synthetic.write(folder / "data"), *SHORT]
    found: dict[int, Any] = {}
    for ranks in (1, 2, 3):
        hashes = run_ranks(runs, ranks, folder=str(folder / str(ranks)), overrides=overrides, settings=SETTINGS)
        assert all(other == hashes[0] for other in hashes)
        found[ranks] = {name: (hashes[0][name], records(folder / str(ranks) / name)) for name in SETTINGS}
    return found


@pytest.mark.parametrize("setting", [name for name in SETTINGS if name != "one shard"])
def test_two_and_three_ranks_learn_what_one_learns(by_ranks: dict[int, Any], setting: str) -> None:
    assert by_ranks[2][setting] == by_ranks[1][setting]
    assert by_ranks[3][setting] == by_ranks[1][setting]


def test_the_test_set_is_measured_once_and_the_average_beside_the_weights(by_ranks: dict[int, Any]) -> None:
    _, found = by_ranks[2]["augmented, validated, averaged"]
    steps = {
        split: [record["step"] for record in found if record["split"] == split] for split in ("validation", "test")
    }
    assert steps == {"validation": [6, 12], "test": [12]}
    assert all({"average_loss", "average_accuracy"} <= {*record} for record in found if record["split"] != "train")
    assert by_ranks[2]["augmented, validated, averaged"][0] != by_ranks[2]["eight shards"][0]


def test_cut_by_ranks_the_same_batch_gives_other_bits(by_ranks: dict[int, Any]) -> None:
    """What this file compares can differ: one shard is raised to as many as there are ranks."""
    assert len({by_ranks[ranks]["one shard"][0] for ranks in (1, 2, 3)}) == 3


@pytest.mark.timeout(600)
def test_the_default_run_is_one_run_at_1_to_5_ranks_over_gloo_and_mpi(run_ranks: Any, tmp_path: Path) -> None:
    overrides = ["train.max_steps=60", "train.log_every_steps=1"]
    alone = outcome(run_ranks, tmp_path / "1", 1, overrides)
    assert len(alone[1]) == 61 and alone[1][-1]["split"] == "test"
    for ranks, controller in ((2, "mpi"), (3, "gloo"), (4, "mpi"), (5, "gloo")):
        assert outcome(run_ranks, tmp_path / str(ranks), ranks, overrides, controller) == alone, (ranks, controller)


@pytest.mark.parametrize(
    "network", [f"{__file__}:with_dropout", "resnet18_v1", pytest.param("mobilenet_v2_0_25", marks=pytest.mark.slow)]
)
def test_networks_of_others_learn_the_same_at_any_number_of_ranks(run_ranks: Any, tmp_path: Path, network: str) -> None:
    overrides = [*synthetic.write(tmp_path / "data"), *SHORT, "train.max_steps=3", f"model.name={network}"]
    alone = outcome(run_ranks, tmp_path / "1", 1, overrides)
    for ranks in (2, 4):
        assert outcome(run_ranks, tmp_path / str(ranks), ranks, overrides) == alone, ranks


def in_every_format(folder: Path) -> dict[str, list[str]]:
    """The same pictures as folders, as folders that several threads decode, as records and as IDX; and damaged ones."""
    damaged = synthetic.write_pictures(folder / "damaged")
    picture = folder / "damaged" / "train" / "green" / "00004.png"
    picture.write_bytes(picture.read_bytes()[:-40])
    return {
        "folders": synthetic.write_pictures(folder / "folders"),
        "threads": [f"data.dir={folder / 'folders'}", "data.global_batch=24", "data.decode_threads=3"],
        "records": synthetic.write_records(folder / "records"),
        "idx": synthetic.write_coloured_idx(folder / "idx"),
        "damaged": [*damaged, "data.on_damaged=skip"],
    }


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("network", "ranks"), [(f"{__file__}:with_dropout", [1, 2]), ("resnet18_v1", [1, 2, 3])])
def test_pictures_are_one_run_in_any_format_at_any_number_of_ranks_also_when_cut_off(
    run_ranks: Any, tmp_path: Path, network: str, ranks: list[int]
) -> None:
    overrides = [*SHORT, "train.epochs=1", f"model.name={network}", "checkpoint.every_steps=1"]
    overrides += ["data.compute_mean_std=true", f"data.cache_dir={tmp_path / 'cache'}"]
    settings = in_every_format(tmp_path / "data")
    found = {}
    for size in ranks:
        folder = tmp_path / str(size)
        hashes = run_ranks(runs, size, folder=str(folder), overrides=overrides, settings=settings)
        assert all(of_rank == hashes[0] for of_rank in hashes)
        found[size] = {name: (hashes[0][name], records(folder / name)) for name in settings}
        assert found[size] == found[1]
        assert "green/00004.png" in (folder / "damaged" / "dataset.json").read_text()
    alone = found[1]["folders"]
    assert all((outcome == alone) == (name != "damaged") for name, outcome in found[1].items())
    overrides += settings["folders"]
    run_ranks(cut_off, ranks[-1], folder=str(tmp_path / "cut"), overrides=overrides, step=3)
    assert outcome(run_ranks, tmp_path / "cut", ranks[-2], overrides, resume="auto") == alone


@pytest.mark.fault(6)
def test_resumed_with_other_ranks_it_is_the_run_never_stopped(run_ranks: Any, tmp_path: Path) -> None:
    overrides = [*synthetic.write(tmp_path / "data"), *SHORT, "checkpoint.every_steps=2", "optimizer.momentum=0.9"]
    alone = outcome(run_ranks, tmp_path / "whole", 2, overrides)
    run_ranks(cut_off, 1, folder=str(tmp_path / "cut"), overrides=overrides, step=5)
    run_ranks(cut_off, 3, folder=str(tmp_path / "cut"), overrides=overrides, step=9, resume="auto")
    assert outcome(run_ranks, tmp_path / "cut", 2, overrides, resume="auto") == alone
    final = sorted((tmp_path / "cut" / "checkpoints").iterdir())[-1]
    arrays = decode_arrays(read(final).arrays)
    weights = {name[8:]: array for name, array in arrays.items() if name.startswith("network/")}
    assert sha256_of(weights) == alone[0]
    assert json.loads((final / "manifest.json").read_text())["weights_sha256"] == alone[0]


def test_the_first_steps_are_those_of_one_plain_process_in_float64(run_ranks: Any, tmp_path: Path) -> None:
    overrides = ["train.max_steps=4", "train.log_every_steps=1"]  # each step makes ten times as much of a rounding
    losses, _ = one_process(overrides, 4, dtype="float64")
    _, found = outcome(run_ranks, tmp_path / "run", 2, overrides)
    np.testing.assert_allclose([record["loss"] for record in found if record["split"] == "train"], losses, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_whole_default_run_has_one_hash_and_one_accuracy(run_ranks: Any, tmp_path: Path) -> None:
    alone = outcome(run_ranks, tmp_path / "1", 1, [])
    for ranks in (2, 3, 4):
        assert outcome(run_ranks, tmp_path / str(ranks), ranks, [], "mpi") == alone, ranks
