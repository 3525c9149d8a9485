"""Which checkpoints belong to a run: what may differ and what may not."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from job.checkpoints import resume
from job.checkpoints.resume import differences, identity
from job.checkpoints.store import Store
from job.config import Config, fields, load_config
from job.distributed.comm import Comm
from job.errors import CheckpointError, UsageError

DIGESTS = {"train_images": "a", "train_labels": "b", "test_images": "c", "test_labels": "d"}
FREE = {
    "run.dir=elsewhere": "run.dir", "run.step_timeout_seconds=7": "run.step_timeout_seconds",
    "train.epochs=9": "train.epochs", "train.max_steps=9": "train.max_steps",
    "train.log_every_steps=3": "train.log_every_steps", "data.dir=elsewhere": "data.dir",
    "data.cache_dir=elsewhere": "data.cache_dir", "checkpoint.every_steps=7": "checkpoint.every_steps",
    "checkpoint.keep=7": "checkpoint.keep", "data.decode_threads=2": "data.decode_threads",
    "run.on_nonfinite=skip": "run.on_nonfinite", "run.device=cpu": "run.device",
}  # fmt: skip
BOUND = {
    "run.seed=1": "run.seed", "train.accumulate_steps=2": "train.accumulate_steps",
    "train.clip_gradient_norm=1": "train.clip_gradient_norm", "data.global_batch=128": "data.global_batch",
    "data.validation_fraction=0.1": "data.validation_fraction", "data.validation_seed=1": "data.validation_seed",
    "train.average_decay=0.99": "train.average_decay", "model.dtype=float16": "model.dtype",
    "data.shards=4": "data.shards", "data.augment.horizontal_flip=true": "data.augment.horizontal_flip",
    "data.augment.crop_padding=2": "data.augment.crop_padding",
    "data.augment.erase_probability=0.1": "data.augment.erase_probability",
    "data.augment.erase_area=0.1": "data.augment.erase_area",
    "data.augment.colour_jitter=0.1": "data.augment.colour_jitter",
    "model.dtype=float64": "model.dtype", "model.dense_batch_norm=true": "model.dense_batch_norm",
    "model.sync_batch_norm=false": "model.sync_batch_norm",
    "model.sync_batch_norm_group=2": "model.sync_batch_norm_group", "optimizer.momentum=0.9": "optimizer.momentum",
    "schedule.name=cosine": "schedule.name",
}  # fmt: skip

PIXELS = {"data.image_size", "data.mean", "data.std", "data.compute_mean_std"}  # what the network sees of the data


def of(*overrides: str, ranks: int = 2, **digests: str) -> dict[str, Any]:
    return identity(load_config(overrides=overrides), ranks, {**DIGESTS, **digests})


@pytest.mark.parametrize("override", list(FREE))
def test_what_changes_nothing_that_is_learned_may_differ(override: str) -> None:
    assert differences(of(), of(override)) == []


@pytest.mark.parametrize("override", list(BOUND))
def test_what_changes_what_is_learned_may_not_differ_and_is_named(override: str) -> None:
    (line,) = differences(of(), of(override))
    assert line.startswith(f"{BOUND[override]}: ")
    assert differences(of(), of(override, f"run.resume_ignoring=[{BOUND[override]}]")) == []


def test_other_data_is_named() -> None:
    assert differences(of(), of(test_labels="x")) == ["data.sha256.test_labels: d there, x now"]


def test_every_key_is_decided_upon() -> None:
    decided = {*resume._FREE, *BOUND.values(), "train.fp16_allreduce"} | {
        key for key, _ in fields() if key.startswith("data.sha256.")
    }
    left = {key for key, _ in fields()} - decided - PIXELS
    assert {key.partition(".")[0] for key in left} <= {"train", "model", "optimizer", "schedule"}


def test_with_a_cosine_the_length_of_the_run_is_part_of_what_is_learned() -> None:
    cosine = "schedule.name=cosine"
    (line,) = differences(of(cosine), of(cosine, "train.epochs=9"))
    assert line == "train.epochs: 5 there, 9 now"


def test_a_batch_per_rank_is_compared_as_the_global_batch_that_it_makes() -> None:
    per_rank = "data.batch_per_rank=128", "data.global_batch=null"
    assert differences(of(*per_rank), of("data.batch_per_rank=64", "data.global_batch=null", ranks=4)) == []
    assert differences(of(*per_rank), of(*per_rank, ranks=3)) == ["data.global_batch: 256 there, 384 now"]


def test_with_fp16_allreduce_the_number_of_ranks_is_part_of_what_is_learned() -> None:
    mixed, compressed = "model.dtype=float16", "train.fp16_allreduce=true"
    assert differences(of(mixed), of(mixed, ranks=3)) == []
    assert differences(of(mixed), of(mixed, compressed)) == ["train.fp16_allreduce: False there, on 2 ranks now"]
    (line,) = differences(of(mixed, compressed), of(mixed, compressed, ranks=3))
    assert line == "train.fp16_allreduce: on 2 ranks there, on 3 ranks now"
    ignored = "run.resume_ignoring=[train.fp16_allreduce]"
    assert differences(of(mixed, compressed), of(mixed, compressed, ignored, ranks=3)) == []


def test_a_key_that_was_not_there_yet_had_the_effect_of_its_default() -> None:
    before = {key: value for key, value in of().items() if key != "train.label_smoothing"}
    assert differences(before, of()) == []
    assert differences(before, of("train.label_smoothing=0.1")) == ["train.label_smoothing: 0.0 there, 0.1 now"]


@pytest.mark.parametrize("key", ["model.fuse_batch_norm", "model.direct_convolution"])
def test_a_run_begun_before_an_operator_was_ours_does_not_go_on_with_other_bits(key: str) -> None:
    before = {other: value for other, value in of().items() if other != key}
    assert differences(before, of()) == [f"{key}: False there, True now"]
    assert differences(before, of(f"{key}=false")) == []


def write(folder: Path, *overrides: str) -> None:
    Store(folder / "checkpoints", 5).write(7, {}, {"config": of(*overrides), "parts": {}})


def config(folder: Path, *overrides: str) -> Config:
    digests = [f"data.sha256.{key}=any" for key in DIGESTS]
    return load_config(overrides=[f"run.dir={folder}", f"data.dir={folder}", "data.format=idx", *digests, *overrides])


def test_another_run_is_refused_before_anything_starts_though_the_data_is_not_known_yet(tmp_path: Path) -> None:
    write(tmp_path)
    resume.check(config(tmp_path, "run.resume=auto"), 2)
    resume.check(config(tmp_path, "run.seed=1"), 2)  # which does not go on with it
    with pytest.raises(UsageError, match=r"after step 7 is of another run.*\n  run\.seed: 0 there, 1 now\n"):
        resume.check(config(tmp_path, "run.resume=auto", "run.seed=1"), 2)


def test_other_shards_are_refused_before_anything_starts_and_ranks_that_need_as_many_are_not(tmp_path: Path) -> None:
    write(tmp_path)
    other = config(tmp_path, "run.resume=auto", "data.shards=4")
    resume.check(other, 8)
    for ranks, now in ((2, 4), (16, 16)):
        with pytest.raises(UsageError, match=rf"\n  data\.shards: 8 there, {now} now\n"):
            resume.check(other, ranks)


def test_shards_that_a_small_data_set_may_bring_down_are_compared_when_it_is_known(tmp_path: Path) -> None:
    write(tmp_path, "data.global_batch=12")
    resume.check(config(tmp_path, "run.resume=auto", "data.global_batch=12", "data.shards=9"), 1)
    found = Store(tmp_path / "checkpoints", 5).newest(print)
    assert found is not None
    with pytest.raises(UsageError, match=r"\n  data\.shards: 8 there, 9 now\n"):
        resume.require_same_run(found, of("data.global_batch=12", "data.shards=9"))


def test_a_named_checkpoint_must_be_one(tmp_path: Path) -> None:
    write(tmp_path)
    resume.check(config(tmp_path / "new", f"run.resume={tmp_path}/checkpoints/step-00000007"), 2)
    with pytest.raises(CheckpointError, match=r"run\.resume: no checkpoint that can be gone on from: .*absent"):
        resume.check(config(tmp_path / "new", f"run.resume={tmp_path}/absent"), 2)


def test_nothing_of_the_configuration_is_lost_in_json() -> None:
    assert json.loads(json.dumps(of())) == of()


def test_the_refusal_of_another_run_gives_the_option_that_goes_on_all_the_same(tmp_path: Path) -> None:
    write(tmp_path)
    asked = ["run.resume=auto", "optimizer.learning_rate=0.1", "train.label_smoothing=0.1"]
    with pytest.raises(UsageError) as caught:
        resume.check(config(tmp_path, *asked), 2)
    (option,) = re.findall(r"add (run\.resume_ignoring=\S+) to go on", str(caught.value))
    resume.check(config(tmp_path, *asked, option), 2)


def test_a_run_begun_by_a_version_that_adds_up_in_another_order_goes_on_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def warnings(state: dict[str, Any]) -> str:
        store = Store(tmp_path / "checkpoints", 5)
        store.write(7, {}, {"config": of(), "parts": {}, **state})
        with resume.open_checkpoints(config(tmp_path, "run.resume=auto"), Comm(), DIGESTS) as checkpoints:
            checkpoints._choose()
        return capsys.readouterr().err

    assert "adds up in another order has begun this run" in warnings({})
    assert warnings({"order_of_sums": resume._ORDER_OF_SUMS}) == ""
