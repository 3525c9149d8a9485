"""What TensorBoard shows of a run. Names and steps are stable: after a resume every curve goes on where it was."""

from __future__ import annotations

import io
import math
import queue
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO, NamedTuple, Optional, Union, get_args, get_origin

import numpy as np
from mxnet.gluon import nn
from PIL import Image
from tensorboard.plugins.hparams import api_pb2, plugin_data_pb2
from tensorboardX import SummaryWriter, event_file_writer
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.summary_pb2 import Summary, SummaryMetadata

from job.config import Config, fields
from job.data.dataset import FASHION_MNIST, Dataset, Split
from job.errors import UsageError
from job.fitness.facts import commit, versions
from job.monitoring import pictures
from job.monitoring.graph import graph_of
from job.monitoring.history import read_changes
from job.monitoring.records import Record, Writer
from job.run_dir import CHANGES
from job.training.evaluation import Mistake
from job.training.learner import Learner

# Test images whose features the projector shows. A square number: tensorboardX leaves the rest of its sprite to chance.
PROJECTED = 256
BINS = 64  # of a histogram
DRAWN_CLASSES = 50  # more make a confusion matrix that nobody can read, and too many curves

_GROUPS = {
    "learning_rate": "optimizer", "gradient_norm": "optimizer", "update_ratio": "optimizer",
    "loss_scale": "optimizer", "skipped": "optimizer",
    "images_per_second": "throughput", "ranks": "throughput",
}  # fmt: skip
_OWN_PAGES = ("step", "split", "pace", "confusion", "mistakes")  # not scalars as they stand
_LAYOUT = {
    "train and test": {
        "loss": ["Multiline", ["train/loss", "validation/loss", "test/loss"]],
        "accuracy": ["Multiline", ["train/accuracy", "validation/accuracy", "test/accuracy"]],
        "accuracy by class": ["Multiline", ["accuracy_by_class/.*"]],
    },
    "ranks": {
        "own seconds of a step: the highest curve is the rank that the others wait for": [
            "Multiline", ["ranks/compute_seconds/.*"],
        ],
        "seconds of a step spent waiting": ["Multiline", ["ranks/wait_seconds/.*"]],
        "images per second of own time": ["Multiline", ["ranks/images_per_second/.*"]],
        "memory": ["Multiline", ["memory/.*"]],
    },
}  # fmt: skip
_COMPARED = ("model.", "optimizer.", "schedule.", "train.", "data.global_batch", "data.batch_per_rank", "run.seed")
_COLUMNS_FIRST = ("ranks", "data.global_batch", "model.sync_batch_norm", "optimizer.learning_rate", "optimizer.name")
_METRICS = ("test/accuracy", "test/loss", "train/accuracy", "train/loss", "throughput/images_per_second")


class Subject(NamedTuple):
    """What is looked into: a run's configuration, its network, and its data."""

    config: Config
    learner: Learner
    data: Dataset


class TensorBoard(Writer):
    """Scalars of every record; with each evaluation pictures and histograms; at the end the projector.

    Readers forget what is there after ``last_step``: it comes again. What has no step is written once.

    Args:
        folder: of the event files.
        last_step: that the run goes on after.
        subject: what to show beside the records.
    """

    def __init__(self, folder: Path, last_step: int = 0, subject: Optional[Subject] = None) -> None:
        goes_on = any(folder.glob("events.*"))
        # A name of its own: the default one is that of any other file made within the same second, and replaces it.
        suffix = f".{time.time_ns()}"
        self._folder = folder
        self._last_step = last_step
        self._changes_told = 0
        # TensorBoard takes the first mark of a start for the beginning, and forgets steps only from the second on.
        purge_step = last_step + 1 if goes_on else 0
        with _a_queue_within_the_process():
            self._writer = SummaryWriter(str(folder), purge_step=purge_step, filename_suffix=suffix)
        _name_after_the_others(self._writer, folder)
        self._file = _written_at_once(self._writer)
        self._subject = subject
        self._classes = (subject.learner.feed.about if subject else FASHION_MNIST).classes
        self._described = False
        if not goes_on:
            self._writer.add_custom_scalars(_LAYOUT)
            if subject:
                graph = graph_of(subject.learner.net, subject.learner.feed.about.shape)
                self._writer.file_writer.add_event(Event(graph_def=graph.SerializeToString()))
                self._add_hparams(experiment=experiment())
                self._add_hparams(session_start_info=session_start(subject.config, subject.learner.comm.size))

    def write(self, record: Record) -> None:
        step = record["step"]
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars(record, self._classes)]
        self._writer.file_writer.add_summary(Summary(value=values), step)  # in one event: half the time of one each
        if self._subject and not self._described:
            self._describe(self._subject, step)
        if self._subject and record["split"] != "train":
            splits = dict(self._subject.data.measured(last=True))
            self._draw(record, splits[record["split"]], step)
            if record["split"] == next(iter(splits)):
                self._add_histograms(self._subject.learner, step)
        self._tell_changes()
        self._file.flush()  # or the last ones are lost with the process; not to the disk, for which a step would wait

    def sync(self) -> None:
        self._writer.flush()

    def _tell_changes(self) -> None:
        """A text for each time that other ranks went on, which the launcher notes after their first step."""
        try:
            known = list(read_changes(self._folder.parent / CHANGES, []))
        except UsageError:  # it cannot be read, and is not worth a run
            return
        changes = [change for change in known if change.step >= self._last_step]
        for change in changes[self._changes_told :]:
            self._writer.add_text("changes", str(change), change.step)
        self._changes_told = len(changes)

    def finish(self, summary: Record) -> None:
        if self._subject:
            if not (self._folder / f"{summary['steps']:05d}").exists():  # of a run that was complete before
                self._writer.add_text("weights", f"SHA-256 {summary['weights_sha256']}", summary["steps"])
                self._project(self._subject, summary["steps"])
            done = api_pb2.Status.Value("STATUS_SUCCESS")
            self._add_hparams(session_end_info=plugin_data_pb2.SessionEndInfo(status=done, end_time_secs=time.time()))

    def close(self) -> None:
        self._writer.close()

    def _describe(self, subject: Subject, step: int) -> None:
        """At the step of the first record, so that a resumed run says what it went on with, and no step comes twice."""
        values = subject.config.model_dump(mode="json")
        self._writer.add_text("config", table({key: _value(values, key) for key, _ in fields()}), step)
        about = {"git commit": commit(), **versions(), "ranks": subject.learner.comm.size}
        self._writer.add_text("versions", table(about), step)
        self._described = True

    def _draw(self, record: Record, split: Split, step: int) -> None:
        title = f"step {step}: {record['accuracy']:.2%} of {record['examples']} {record['split']} images right"
        confusion = np.array(record["confusion"])
        mistakes = [Mistake(**mistake) for mistake in record["mistakes"]]
        images = split.images[np.array([mistake.image for mistake in mistakes], np.int64)] if mistakes else []
        drawn = {
            "worst_mistakes": pictures.worst_mistakes(mistakes, images, self._classes, f"step {step}: worst mistakes")
        }
        if len(self._classes) <= DRAWN_CLASSES:
            drawn["confusion_matrix"] = pictures.confusion_matrix(confusion, self._classes, title)
        coloured = self._subject is not None and self._subject.learner.feed.about.shape[0] == 3
        for name, picture in sorted(drawn.items()):
            few = pictures.in_few_colours(picture, coloured and name == "worst_mistakes")
            image = Summary.Value(tag=f"{record['split']}/{name}", image=_png(few))
            self._writer.file_writer.add_summary(Summary(value=[image]), step)

    def _add_histograms(self, learner: Learner, step: int) -> None:
        for place, parameter in learner.net._collect_params_with_prefix().items():
            trained = parameter.grad_req != "null"
            shown = {"weights" if trained else "batch_norm": parameter.data()}
            if trained:
                shown["gradients"] = parameter.grad()
            for group, array in shown.items():
                values = array.asnumpy()
                if np.isfinite(values).all():
                    self._writer.add_histogram(f"{group}/{place}", values, step, bins=BINS)

    def _project(self, subject: Subject, step: int) -> None:
        """The features that the last layer decides by. Rank 0 computes them alone: inference never communicates."""
        features_of = _features(subject.learner.net)
        if features_of is None:
            return
        learner, test = subject.learner, subject.data.test
        side = math.isqrt(min(PROJECTED, len(test.labels)))
        shown = slice(0, side**2)
        images, _ = learner.feed(test, shown)
        found = features_of(images).asnumpy().astype(np.float64)
        features = found.reshape(len(found), -1).round(4)  # written as text
        names = [self._classes[label] for label in test.labels[shown]]
        pixels = test.images[shown].reshape(-1, *learner.feed.about.shape) / np.float32(255)
        sprites = pixels if pixels.shape[1] == 3 else np.repeat(pixels[:, :1], 3, axis=1)
        self._writer.add_embedding(features, names, sprites, step, tag="penultimate_features")

    def _add_hparams(self, **content: Any) -> None:
        """One message of the HPARAMS tab. In the run's own folder it makes the run, and not a part of it, a row."""
        (kind,) = content
        data = plugin_data_pb2.HParamsPluginData(version=0, **content)
        plugin = SummaryMetadata.PluginData(plugin_name="hparams", content=data.SerializeToString())
        value = Summary.Value(tag=f"_hparams_/{kind}", metadata=SummaryMetadata(plugin_data=plugin))
        self._writer.file_writer.add_summary(Summary(value=[value]))


def _features(net: Any) -> Any:
    """The part of a network before its last layer; None where which one that is, is not known."""
    if isinstance(net, nn.HybridSequential):
        return net[:-1]
    return getattr(net, "features", None) if hasattr(net, "output") else None  # as MXNet's model zoo has them


def _name_after_the_others(writer: SummaryWriter, folder: Path) -> None:
    """Have readers come to this file last. They go by the time in its name, and the clock may have been set back."""
    file = Path(writer.file_writer.event_writer._ev_writer._file_name)
    others = [_time_of(other) for other in folder.glob("events.*") if other.name != file.name]
    if others and _time_of(file) <= max(others):
        file.rename(file.with_name(file.name.replace(str(_time_of(file)), str(max(others) + 1), 1)))


def _time_of(file: Path) -> int:
    found = re.match(r"events\.out\.tfevents\.(\d+)", file.name)
    return int(found[1]) if found else 0


class _Queue(queue.Queue):
    """With the one method more that tensorboardX calls."""

    def close(self) -> None:
        """There is nothing to close."""


@contextmanager
def _a_queue_within_the_process() -> Iterator[None]:
    """TensorboardX takes one between processes, which needs /dev/shm, for a thread of its own."""
    was = event_file_writer.multiprocessing
    event_file_writer.multiprocessing = SimpleNamespace(Queue=_Queue)
    try:
        yield
    finally:
        event_file_writer.multiprocessing = was


def _written_at_once(writer: SummaryWriter) -> BinaryIO:
    """Have this thread write the events. Returns the file into which it does.

    tensorboardX hands them to a thread of its own through a short queue: what is in it is lost with the process, and if
    that thread dies of a full disk, whoever writes next waits for ever.
    """
    events = writer.file_writer.event_writer
    events._worker.stop()
    events.add_event = events._ev_writer.write_event
    file: BinaryIO = events._ev_writer._py_recordio_writer._writer
    return file


def _png(picture: Image.Image) -> Summary.Image:
    """Pressed little: much of the time goes into tensorboardX's sum over the bytes, and the rest into pressing."""
    stream = io.BytesIO()
    picture.save(stream, "PNG", compress_level=1)
    return Summary.Image(
        height=picture.height, width=picture.width, colorspace=3, encoded_image_string=stream.getvalue()
    )


def scalars(record: Record, classes: Sequence[str] = FASHION_MNIST.classes) -> Iterator[tuple[str, float]]:
    """The curves that a record adds a point to, in groups that fold well."""
    split = record["split"]
    for name, value in record.items():
        if name not in _OWN_PAGES and (split == "train" or name != "ranks"):  # which the train record of the step has
            yield f"{_GROUPS.get(name, split)}/{name}", value
    for name, value in record.get("pace", {}).items():
        if isinstance(value, list):
            group = "memory" if name.endswith("_bytes") else "ranks"
            yield from ((f"{group}/{name}/{rank}", of_rank) for rank, of_rank in enumerate(value))
        else:
            yield f"throughput/{name}", value
    if len(classes) > DRAWN_CLASSES:
        return
    by_class = "validation_accuracy_by_class" if split == "validation" else "accuracy_by_class"
    for name, counts, place in zip(classes, record.get("confusion", ()), range(len(classes))):
        yield f"{by_class}/{re.sub('[^a-zA-Z]+', '_', name)}", counts[place] / max(sum(counts), 1)


def experiment() -> api_pb2.Experiment:
    """The columns of the HPARAMS tab: the same for every run, so that all runs fit into one table."""
    kinds = {**{key: _kind(field.annotation) for key, field in _compared()}, "ranks": _kind(int)}
    # The tab opens with the first five columns, and what is said to differ comes first.
    hparams = [api_pb2.HParamInfo(name=k, type=kind, differs=k in _COLUMNS_FIRST) for k, kind in kinds.items()]
    metrics = [api_pb2.MetricInfo(name=api_pb2.MetricName(tag=tag)) for tag in _METRICS]
    return api_pb2.Experiment(hparam_infos=hparams, metric_infos=metrics)


def session_start(config: Config, ranks: int) -> plugin_data_pb2.SessionStartInfo:
    """The row of this run; a value that is null has no entry. TensorBoard takes the metrics from the curves' ends."""
    start = plugin_data_pb2.SessionStartInfo(start_time_secs=time.time())
    values = config.model_dump(mode="json")
    for key, value in {**{key: _value(values, key) for key, _ in _compared()}, "ranks": ranks}.items():
        if isinstance(value, bool):
            start.hparams[key].bool_value = value
        elif isinstance(value, (int, float)):
            start.hparams[key].number_value = value
        elif isinstance(value, str):
            start.hparams[key].string_value = readable(value)
    return start


def _compared() -> Iterator[tuple[str, Any]]:
    """The keys that runs are compared by: those that change what is learned, and are one value."""
    compared = ((key, field) for key, field in fields() if key.startswith(_COMPARED))
    return ((key, field) for key, field in compared if get_origin(field.annotation) not in (list, dict))


def _kind(annotation: Any) -> int:
    alternatives = get_args(annotation) if get_origin(annotation) is Union else (annotation,)
    name = "BOOL" if bool in alternatives else "FLOAT64" if {int, float} & {*alternatives} else "STRING"
    return int(api_pb2.DataType.Value(f"DATA_TYPE_{name}"))


def _value(values: Mapping[str, Any], key: str) -> Any:
    for name in key.split("."):
        values = values[name]
    return values


def table(rows: Mapping[str, Any]) -> str:
    """A Markdown table of names and values."""
    lines = (f"| {name} | {str(value).replace('|', chr(92) + '|')} |" for name, value in rows.items())
    return readable("\n".join(["| | |", "|---|---|", *lines]))


def readable(text: str) -> str:
    """``text`` without what UTF-8 cannot hold: a path may be any bytes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
