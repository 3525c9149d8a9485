"""What TensorBoard shows, read back with TensorBoard's own readers."""

from __future__ import annotations

import io
import json
import multiprocessing.synchronize
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Optional

import mxnet as mx
import numpy as np
import pytest
from google.protobuf import text_format
from mxnet.gluon import nn
from PIL import Image
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator as PluginEventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.compat.proto.graph_pb2 import GraphDef
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams import api_pb2
from tensorboard.plugins.hparams.backend_context import Context
from tensorboard.plugins.hparams.list_session_groups import Handler
from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig

from job.config import Config, load_config
from job.data.dataset import FASHION_MNIST, Dataset, Split
from job.data.sampler import Shard
from job.distributed.comm import Comm
from job.distributed.device import seed_everything
from job.monitoring import pictures, tensorboard
from job.monitoring.tensorboard import Subject, TensorBoard, commit
from job.networks import models
from job.training.evaluation import Mistake
from job.training.feed import Feed
from job.training.learner import Learner
from tests.examples import CONFUSION, SUMMARY, TEST, TRAIN


class Alone(Comm):
    """Rank 0 of 2, whose other rank does something else: whoever waits for it waits for ever."""

    size = 2

    def sum(self, values: np.ndarray, name: str) -> np.ndarray:
        raise AssertionError(f"rank 0 communicates alone: {name}")


def subject(*overrides: str) -> Subject:
    config = load_config(overrides=overrides)
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (40, 28, 28), dtype=np.uint8)
    split = Split(images, random.integers(0, 10, 40, dtype=np.uint8))  # type: ignore[arg-type]
    seed_everything(0)
    net = models.build(config.model)
    models.initialize(net, mx.cpu())
    learner = Learner(net, Comm(), Feed(mx.cpu(), "float32"), config)
    learner.step(split, [[Shard(np.arange(first, first + 5), first) for first in range(0, 40, 5)]], 40, 0.1)
    learner.comm = Alone()
    return Subject(config, learner, Dataset(split, split, FASHION_MNIST, {}))


def write(folder: Path, *records: dict[str, Any], last_step: int = 0, shown: Optional[Subject] = None) -> None:
    writer = TensorBoard(folder, last_step, shown)
    for record in records:
        writer.write(record)
    writer.close()


def read(folder: Path) -> EventAccumulator:
    everything = {"scalars": 0, "images": 0, "histograms": 0, "tensors": 0}
    return EventAccumulator(str(folder), size_guidance=everything).Reload()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Subject]:
    """The folder of a run with one training record and one evaluation, complete."""
    folder = tmp_path_factory.mktemp("whole") / "tensorboard"
    shown = subject("optimizer.learning_rate=0.125")
    writer = TensorBoard(folder, subject=shown)
    writer.write(TRAIN)
    writer.write(TEST)
    writer.finish(SUMMARY)
    writer.close()
    return folder, shown


def test_a_step_does_not_wait_for_the_disk_and_a_checkpoint_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    board, synced = TensorBoard(tmp_path), []
    (events,) = tmp_path.glob("events.*")
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.path.samestat(os.fstat(file), events.stat())))
    board.write(TRAIN)
    assert synced == []
    board.sync()
    assert synced == [True]


def test_a_record_is_in_the_file_when_write_returns(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path)
    for step in range(1, 50):  # with a thread that writes, some of them would be late
        board.write({**TRAIN, "step": step})
        assert EventAccumulator(str(tmp_path)).Reload().Scalars("train/loss")[-1].step == step
    board.close()


def test_a_full_disk_is_told_to_who_writes_and_not_to_a_thread_that_dies_of_it(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path)
    (file,) = tmp_path.iterdir()
    (number,) = (int(link.name) for link in Path("/proc/self/fd").iterdir() if link.resolve() == file)
    kept, full = os.dup(number), os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, number)
    with pytest.raises(OSError, match="No space left"):
        board._writer.add_text("long", "x" * 100_000)  # more than a buffer holds
    os.dup2(kept, number)
    board.close()


def test_every_scalar_is_at_its_step_in_its_group(tmp_path: Path) -> None:
    write(tmp_path, TRAIN, {**TRAIN, "step": 20, "loss": 0.5}, TEST)
    events = read(tmp_path)
    points = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    train = {
        "train/epoch", "train/loss", "train/accuracy",
        "optimizer/learning_rate", "optimizer/gradient_norm", "optimizer/update_ratio",
        "throughput/images_per_second", "throughput/step_seconds_p50", "throughput/step_seconds_p99",
        "throughput/ranks",
        "ranks/compute_seconds/0", "ranks/compute_seconds/1", "ranks/wait_seconds/0", "ranks/wait_seconds/1",
        "ranks/images_per_second/0", "ranks/images_per_second/1", "memory/rss_bytes/0", "memory/rss_bytes/1",
    }  # fmt: skip
    test = {"test/epoch", "test/loss", "test/accuracy", "test/examples", "test/train_loss", "test/train_accuracy"}
    names = "T_shirt_top Trouser Pullover Dress Coat Sandal Shirt Sneaker Bag Ankle_boot".split()
    by_class = {f"accuracy_by_class/{name}" for name in names}
    assert {tag: [step for step, _ in values] for tag, values in points.items()} == {
        **{tag: [10, 20] for tag in train},
        **{tag: [235] for tag in test | by_class},
    }
    values = {tag: values[-1][1] for tag, values in points.items()}
    assert points["train/loss"][0][1] == pytest.approx(0.68604, rel=1e-7)  # event files hold float32
    assert values["train/loss"] == 0.5
    assert values["optimizer/gradient_norm"] == 1.5
    assert values["throughput/images_per_second"] == pytest.approx(21000.4, rel=1e-7)
    assert (values["throughput/ranks"], values["throughput/step_seconds_p99"]) == (2, pytest.approx(0.09))
    assert (values["ranks/compute_seconds/1"], values["ranks/wait_seconds/1"]) == pytest.approx((0.055, 0.005))
    assert values["memory/rss_bytes/1"] == 390_000_000
    assert (values["test/examples"], values["test/train_loss"]) == (10_000, 0.25)


def test_the_accuracy_of_a_class_is_its_part_of_its_row(tmp_path: Path) -> None:
    write(tmp_path, TEST)
    events = read(tmp_path)
    shares = [events.Scalars(f"accuracy_by_class/{name}")[0].value for name in ("T_shirt_top", "Trouser", "Ankle_boot")]
    assert shares == pytest.approx([8 / 10, 1.0, 0.0])


def test_one_page_puts_train_and_test_on_one_chart_and_all_ranks_on_another(tmp_path: Path) -> None:
    write(tmp_path, TRAIN)
    layout = Layout.FromString(read(tmp_path).Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    charts = {chart.title: list(chart.multiline.tag) for category in layout.category for chart in category.chart}
    assert charts["loss"] == ["train/loss", "validation/loss", "test/loss"]
    assert charts["accuracy"] == ["train/accuracy", "validation/accuracy", "test/accuracy"]
    assert ["ranks/compute_seconds/.*"] in charts.values() and ["ranks/wait_seconds/.*"] in charts.values()


def steps_of(folder: Path) -> dict[str, list[int]]:
    """The steps of each tag, as TensorBoard's own server reads them: unlike the other reader it forgets text too."""
    events = PluginEventAccumulator(str(folder), tensor_size_guidance=dict.fromkeys(KINDS, 0)).Reload()
    tags = [tag for tag in events.Tags()["tensors"] if tag not in WITHOUT_STEPS]
    return {tag: [event.step for event in events.Tensors(tag)] for tag in tags}


KINDS = ("scalars", "images", "histograms", "text")
WITHOUT_STEPS = ("__run_graph__", "custom_scalars__config__", "_hparams_/experiment", "_hparams_/session_start_info")


@pytest.mark.parametrize("seconds", [-86_400, -1, 0, 86_400])
def test_after_a_resume_with_another_clock_no_step_is_lost_or_comes_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: int
) -> None:
    """Readers come to the files in the order of the times in their names."""
    started = time.time()
    for start, last_step in enumerate((0, 2, 3)):
        monkeypatch.setattr(time, "time", lambda start=start: started + start * seconds)
        steps = range(last_step + 1, last_step + 4)
        write(tmp_path, *({**TRAIN, "step": step, "loss": 10.0 * start + step} for step in steps), last_step=last_step)
    points = [(event.step, event.value) for event in read(tmp_path).Scalars("train/loss")]
    assert points == [(1, 1.0), (2, 2.0), (3, 13.0), (4, 24.0), (5, 25.0), (6, 26.0)]


def test_after_a_resume_no_step_comes_twice_or_goes_back(tmp_path: Path) -> None:
    shown = subject()

    def records(*steps: int) -> list[dict[str, Any]]:
        return [{**record, "step": step} for step in steps for record in (TRAIN, TEST)]

    write(tmp_path, *records(5, 6, 7, 8), shown=shown)
    write(tmp_path, *records(7), last_step=6, shown=shown)
    write(tmp_path, *records(7, 8, 9), last_step=6, shown=shown)
    steps = steps_of(tmp_path)
    assert steps.pop("config/text_summary") == steps.pop("versions/text_summary") == [5, 7]  # of each process's start
    assert len(steps) > 50
    assert set(map(tuple, steps.values())) == {(5, 6, 7, 8, 9)}
    assert len(read(tmp_path).Tensors("custom_scalars__config__")) == 1


def test_a_run_that_goes_on_from_before_its_first_record_shows_it_once(tmp_path: Path) -> None:
    for _ in range(2):
        write(tmp_path, TRAIN, TEST, shown=subject())
    assert all(len(steps) == 1 for steps in steps_of(tmp_path).values())


def test_the_pictures_are_those_of_the_evaluation(whole: tuple[Path, Subject]) -> None:
    folder, shown = whole
    events = read(folder)
    assert set(events.Tags()["images"]) == {"test/confusion_matrix", "test/worst_mistakes"}
    expected = {
        "test/confusion_matrix": pictures.confusion_matrix(
            np.array(CONFUSION), FASHION_MNIST.classes, "step 235: 83.70% of 10000 test images right"
        ),
        "test/worst_mistakes": pictures.worst_mistakes(
            [Mistake(3, 0, 1, 4.5)], [shown.data.test.images[3]], FASHION_MNIST.classes, "step 235: worst mistakes"
        ),
    }
    for tag, picture in expected.items():
        (event,) = events.Images(tag)
        shown_there = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)).convert("RGB")).astype(int)
        np.testing.assert_allclose(shown_there, np.asarray(picture).astype(int), rtol=0, atol=24)  # of 256 colours


def test_a_mistake_of_a_coloured_image_is_shown_in_its_colour(tmp_path: Path) -> None:
    shown = subject()
    green = np.zeros((len(shown.data.test.labels), 3, 28, 28), np.uint8)
    green[:, 1] = 200
    test = Split(green, shown.data.test.labels)
    writer = TensorBoard(tmp_path, subject=shown._replace(data=Dataset(test, test, FASHION_MNIST, {})))
    shown.learner.feed.about = replace(FASHION_MNIST, shape=(3, 28, 28))
    writer.write(TEST)
    writer.close()
    (event,) = read(tmp_path).Images("test/worst_mistakes")
    picture = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)).convert("RGB")).astype(int)
    np.testing.assert_allclose(picture[100, 72], [0, 200, 0], atol=8)


def test_histograms_hold_every_number_of_weights_gradients_and_running_statistics(whole: tuple[Path, Subject]) -> None:
    folder, shown = whole
    events = read(folder)
    parameters = shown.learner.net._collect_params_with_prefix()
    expected = {}
    for place, parameter in parameters.items():
        if "running" in place:
            expected[f"batch_norm/{place}"] = parameter.data().asnumpy()
        else:
            expected[f"weights/{place}"] = parameter.data().asnumpy()
            expected[f"gradients/{place}"] = parameter.grad().asnumpy()
    assert set(events.Tags()["histograms"]) == set(expected)
    assert "gradients/0.weight" in expected and "batch_norm/1.running_var" in expected
    for tag, values in expected.items():
        (event,) = events.Histograms(tag)
        histogram = event.histogram_value
        assert (event.step, histogram.num, sum(histogram.bucket)) == (235, values.size, values.size)
        assert (histogram.min, histogram.max) == (values.min(), values.max())
        assert histogram.sum == pytest.approx(values.sum(dtype=np.float64), abs=1e-6)


def test_weights_that_are_not_finite_have_no_histogram_and_do_not_end_the_run(tmp_path: Path) -> None:
    shown = subject()
    shown.learner.net[0].weight.data()[:] = np.nan
    write(tmp_path, TEST, shown=shown)
    tags = read(tmp_path).Tags()["histograms"]
    assert "weights/0.weight" not in tags and "weights/0.bias" in tags


def test_the_projector_has_the_features_the_names_and_the_images(whole: tuple[Path, Subject]) -> None:
    folder, shown = whole
    config = text_format.Parse((folder / "projector_config.pbtxt").read_text(), ProjectorConfig())
    (embedding,) = config.embeddings
    features = np.loadtxt(folder / embedding.tensor_path, delimiter="\t")
    images, _ = shown.learner.feed(shown.data.test, slice(0, 36))  # of 40: the largest square
    *_, last = net = shown.learner.net
    decided = features @ last.weight.data().asnumpy().T + last.bias.data().asnumpy()
    np.testing.assert_allclose(decided, net(images).asnumpy(), atol=1e-3)  # features are written with 4 decimals
    assert features.min() == 0 and features.max() > 0.01
    names = (folder / embedding.metadata_path).read_text().splitlines()
    assert names == [FASHION_MNIST.classes[label] for label in shown.data.test.labels[:36]]
    sprite = np.asarray(Image.open(folder / embedding.sprite.image_path))
    assert list(embedding.sprite.single_image_dim) == [28, 28]
    assert sprite.shape[:2] == (6 * 28, 6 * 28)  # and so no place of it is left to chance
    for index in range(36):
        y, x0 = index // 6 * 28, index % 6 * 28
        difference = sprite[y : y + 28, x0 : x0 + 28, 0].astype(int) - shown.data.test.images[index]
        assert abs(difference).max() <= 1


def test_a_run_that_was_complete_and_is_run_again_projects_once(tmp_path: Path) -> None:
    shown = subject()
    for _ in range(2):
        writer = TensorBoard(tmp_path, 235, shown)
        writer.finish(SUMMARY)
        writer.close()
    config = text_format.Parse((tmp_path / "projector_config.pbtxt").read_text(), ProjectorConfig())
    assert len(config.embeddings) == 1
    assert len(read(tmp_path).Tensors("weights/text_summary")) == 1


def test_the_graph_is_that_of_the_network(whole: tuple[Path, Subject]) -> None:
    graph = GraphDef.FromString(read(whole[0]).Graph().SerializeToString())
    assert {"Convolution", "BatchNorm", "FullyConnected"} <= {node.op for node in graph.node}


def text(folder: Path, tag: str) -> str:
    (event,) = read(folder).Tensors(f"{tag}/text_summary")
    return event.tensor_proto.string_val[0].decode()


def test_the_configuration_and_the_versions_are_there_as_tables(whole: tuple[Path, Subject]) -> None:
    config, versions = text(whole[0], "config"), text(whole[0], "versions")
    assert "| optimizer.learning_rate | 0.125 |" in config and "| run.dir | runs/fashion_mnist |" in config
    assert f"| git commit | {commit()} |" in versions and "| mxnet | 1.9.1 |" in versions


def test_the_hash_of_the_weights_is_there_at_the_end_as_text(whole: tuple[Path, Subject]) -> None:
    assert text(whole[0], "weights") == f"SHA-256 {SUMMARY['weights_sha256']}"
    (event,) = read(whole[0]).Tensors("weights/text_summary")
    assert event.step == SUMMARY["steps"]


def test_as_many_images_are_projected_as_fill_a_square() -> None:
    side = int(tensorboard.PROJECTED**0.5)
    assert side**2 == tensorboard.PROJECTED == 256


def test_a_bar_in_a_value_does_not_break_the_table() -> None:
    assert tensorboard.table({"name": "a|b"}).splitlines()[-1] == "| name | a\\|b |"


def test_runs_compare_in_one_table(tmp_path: Path) -> None:
    for name, rate, accuracy in (("slow", 0.0625, 0.75), ("fast", 0.5, 0.875)):
        shown = subject(f"optimizer.learning_rate={rate}", *(["train.max_steps=10"] if name == "fast" else []))
        writer = TensorBoard(tmp_path / name / "tensorboard", subject=shown)
        writer.write(TRAIN)
        writer.write({**TEST, "accuracy": accuracy})
        if name == "fast":
            writer.finish(SUMMARY)
        writer.close()
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(tmp_path))
    multiplexer.Reload()
    provider = MultiplexerDataProvider(multiplexer, str(tmp_path))
    context = Context(TBContext(data_provider=provider, logdir=str(tmp_path)))
    wanted = [api_pb2.ColParams(metric=api_pb2.MetricName(tag="test/accuracy"), include_in_result=True)]
    wanted += [api_pb2.ColParams(hparam=name, include_in_result=True) for name in COLUMNS]
    every = [api_pb2.STATUS_SUCCESS, api_pb2.STATUS_RUNNING, api_pb2.STATUS_UNKNOWN, api_pb2.STATUS_FAILURE]
    request = api_pb2.ListSessionGroupsRequest(
        allowed_statuses=every, col_params=wanted, start_index=0, slice_size=10, include_metrics=True
    )
    groups = Handler(RequestContext(), context, "", request).run().session_groups
    rows = {}
    for group in groups:
        (session,) = group.sessions
        cells = {name: group.hparams[name] for name in COLUMNS}
        values = {name: getattr(cell, cell.WhichOneof("kind") or "null_value") for name, cell in cells.items()}
        rows[session.name] = (values, session.status, group.metric_values[0].value)
    assert rows == {
        "slow/tensorboard": (
            {"optimizer.learning_rate": 0.0625, "train.max_steps": 0, "model.sync_batch_norm": True,
             "optimizer.name": "sgd", "ranks": 2.0}, api_pb2.STATUS_UNKNOWN, 0.75,
        ),
        "fast/tensorboard": (
            {"optimizer.learning_rate": 0.5, "train.max_steps": 10.0, "model.sync_batch_norm": True,
             "optimizer.name": "sgd", "ranks": 2.0}, api_pb2.STATUS_SUCCESS, 0.875,
        ),
    }  # fmt: skip


def test_the_table_opens_with_the_columns_that_runs_are_told_apart_by(whole: tuple[Path, Subject]) -> None:
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(whole[0]))
    multiplexer.Reload()
    context = Context(TBContext(data_provider=MultiplexerDataProvider(multiplexer, ""), logdir=""))
    metadata = context.hparams_metadata(RequestContext(), "")
    experiment = context.experiment_from_metadata(RequestContext(), "", True, metadata, [])
    assert [info.name for info in experiment.hparam_infos][:5] == [
        "data.global_batch", "model.sync_batch_norm", "optimizer.learning_rate", "optimizer.name", "ranks",
    ]  # fmt: skip
    assert [info.name.tag for info in experiment.metric_infos][:2] == ["test/accuracy", "test/loss"]


COLUMNS = ["optimizer.learning_rate", "train.max_steps", "model.sync_batch_norm", "optimizer.name", "ranks"]


def test_the_columns_of_that_table_have_types_that_fit_every_value() -> None:
    kinds = {info.name: api_pb2.DataType.Name(info.type)[10:] for info in tensorboard.experiment().hparam_infos}
    assert kinds["model.sync_batch_norm"] == "BOOL"
    assert kinds["train.clip_gradient_norm"] == kinds["train.epochs"] == kinds["ranks"] == "FLOAT64"
    assert kinds["optimizer.name"] == "STRING"
    assert "schedule.step_epochs" not in kinds  # a list is no value of a cell
    started = tensorboard.session_start(Config(), 3).hparams
    for name, value in started.items():
        expected = {"bool_value": "BOOL", "number_value": "FLOAT64", "string_value": "STRING"}
        assert kinds[name] == expected[value.WhichOneof("kind")], name


def test_a_folder_of_any_bytes_can_be_shown() -> None:
    folder = b"a\xff".decode("utf-8", "surrogateescape")
    assert tensorboard.table({"run.dir": folder}).encode("utf-8").endswith(b"| run.dir | a\\udcff |")


def test_shared_memory_is_not_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """/dev/shm may be missing or read-only; then no semaphore between processes can be made."""

    def missing(*arguments: Any, **options: Any) -> None:
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(multiprocessing.synchronize._multiprocessing, "SemLock", missing)
    write(tmp_path, {**TRAIN, "step": 1, "loss": 2.0})
    assert [event.value for event in read(tmp_path).Scalars("train/loss")] == [2.0]


def test_a_network_that_is_no_sequence_would_be_a_mistake_found_here() -> None:
    """The projector cuts off the last layer of a sequence."""
    assert isinstance(models.build(load_config().model), nn.HybridSequential)


def test_a_validation_has_curves_and_pictures_of_its_own_beside_those_of_the_test(tmp_path: Path) -> None:
    shown = subject()
    shown = shown._replace(data=shown.data.holding_out(np.arange(8)))
    validation = {**TRAIN, **TEST, "split": "validation", "average_accuracy": 0.9}
    write(tmp_path, validation, {**TEST, "accuracy": 0.5}, shown=shown)
    events = read(tmp_path)
    assert events.Scalars("validation/accuracy")[0].value == pytest.approx(0.837)
    assert events.Scalars("validation/average_accuracy")[0].value == pytest.approx(0.9)
    assert [event.value for event in events.Scalars("test/accuracy")] == [0.5]
    assert len(events.Scalars("validation_accuracy_by_class/Trouser")) == 1
    assert len(events.Scalars("accuracy_by_class/Trouser")) == 1
    assert {"validation/confusion_matrix", "test/confusion_matrix"} <= {*events.Tags()["images"]}
    assert all(len(events.Histograms(tag)) == 1 for tag in events.Tags()["histograms"])


def test_each_change_of_ranks_since_the_run_went_on_is_told_once_and_says_why(tmp_path: Path) -> None:
    def change(step: int, why: str) -> str:
        noted = {"step": step, "ranks_before": 3, "ranks": 2, "why": why, "replayed_steps": 4, "lost_seconds": 1.5}
        noted |= {"hosts": {"left": 1, "right": 1}} if step > 20 else {}
        return json.dumps(noted) + "\n"

    (tmp_path / "changes.jsonl").write_text(change(5, "long ago"))
    writer = TensorBoard(tmp_path / "tensorboard", 20)
    for step in (30, 40):
        with open(tmp_path / "changes.jsonl", "a") as stream:
            stream.write(change(step - 10, f"rank {step} died"))
        writer.write({**TRAIN, "step": step})
    writer.close()
    told = read(tmp_path / "tensorboard").Tensors("changes/text_summary")
    texts = [event.tensor_proto.string_val[0].decode() for event in told]
    assert [event.step for event in told] == [20, 30]
    assert texts[0] == "3 ranks, then 2: rank 30 died; 4 steps computed again, 1.5 s lost"
    assert texts[1].startswith("3 ranks, then 2 on left (1), right (1): rank 40 died;")


def test_changes_of_ranks_that_cannot_be_read_do_not_end_a_run(tmp_path: Path) -> None:
    (tmp_path / "changes.jsonl").write_bytes(b"\xff\n")
    write(tmp_path / "tensorboard", {**TRAIN, "step": 7})
    assert read(tmp_path / "tensorboard").Scalars("train/loss")[0].step == 7
