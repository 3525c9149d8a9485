"""From sums to records, with a clock that the test turns."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from job.monitoring import recorder
from job.monitoring.recorder import Recorder
from job.monitoring.records import Writer
from job.training.evaluation import Evaluation, Mistake
from job.training.metrics import Totals


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Memory(Writer):
    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.summaries: list[dict[str, Any]] = []

    def write(self, record: dict[str, Any]) -> None:
        self.records.append(record)

    def finish(self, summary: dict[str, Any]) -> None:
        self.summaries.append(summary)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(recorder.time, "perf_counter", clock)
    return clock


@pytest.fixture
def memory(clock: Clock) -> Memory:
    return Memory()


def run_two_epochs(memory: Memory, clock: Clock) -> Recorder:
    """Train 2 s, 4 s, evaluate 50 s; train 3 s, evaluate 70 s."""
    recorder = Recorder([memory])
    clock.now += 2
    recorder.train(2, 0, Totals(300.0, 50.0, 100.0), 0.2)
    clock.now += 4
    recorder.train(4, 0, Totals(50.0, 40.0, 50.0), 0.2)
    clock.now += 50
    recorder.test(4, 0, Evaluation(20.0, 30.0, 40.0))
    clock.now += 3
    recorder.train(6, 1, Totals(75.0, 90.0, 150.0), 0.1)
    clock.now += 70
    recorder.test(6, 1, Evaluation(10.0, 35.0, 40.0))
    return recorder


def test_a_training_record_is_the_window_since_the_last(memory: Memory, clock: Clock) -> None:
    run_two_epochs(memory, clock)
    assert memory.records[0] == {
        "step": 2,
        "epoch": 0,
        "split": "train",
        "loss": 3.0,
        "accuracy": 0.5,
        "learning_rate": 0.2,
        "images_per_second": 50.0,
        "ranks": 1,
    }
    assert (memory.records[1]["loss"], memory.records[1]["images_per_second"]) == (1.0, 12.5)


def test_the_window_after_an_evaluation_leaves_its_time_out(memory: Memory, clock: Clock) -> None:
    run_two_epochs(memory, clock)
    assert memory.records[3]["images_per_second"] == 50.0  # 150 in 3 s


def test_the_time_that_a_writer_takes_is_not_trainings(memory: Memory, clock: Clock) -> None:
    class Slow(Writer):
        def write(self, record: dict[str, Any]) -> None:
            clock.now += 1000

    recorder = Recorder([Slow(), memory])
    for step in (1, 2):
        clock.now += 2
        recorder.train(step, 0, Totals(1.0, 1.0, 100.0), 0.2)
    assert [record["images_per_second"] for record in memory.records] == [50.0, 50.0]


def test_a_test_record_holds_the_whole_epochs_training_beside_it(memory: Memory, clock: Clock) -> None:
    run_two_epochs(memory, clock)
    assert memory.records[2] == {
        "step": 4,
        "epoch": 0,
        "split": "test",
        "loss": 0.5,
        "accuracy": 0.75,
        "examples": 40,
        "train_loss": pytest.approx(350 / 150),  # by samples; the mean of the windows' means would be 2.0
        "train_accuracy": pytest.approx(90 / 150),
        "confusion": [],
        "mistakes": [],
        "ranks": 1,
    }


def test_each_epoch_is_summed_anew(memory: Memory, clock: Clock) -> None:
    run_two_epochs(memory, clock)
    assert (memory.records[4]["train_loss"], memory.records[4]["train_accuracy"]) == (0.5, 0.6)


def test_steps_never_go_back(memory: Memory, clock: Clock) -> None:
    run_two_epochs(memory, clock)
    assert [(record["step"], record["split"]) for record in memory.records] == [
        (2, "train"), (4, "train"), (4, "test"), (6, "train"), (6, "test"),
    ]  # fmt: skip


def test_the_summary_is_the_last_evaluation_and_the_speed_of_training_alone(memory: Memory, clock: Clock) -> None:
    run_two_epochs(memory, clock).finish(ranks=3, sync_batch_norm=True)
    (summary,) = memory.summaries
    expected = {
        "ranks": 3,
        "sync_batch_norm": True,
        "epochs": 2,
        "steps": 6,
        "test_accuracy": 0.875,
        "test_loss": 0.25,
        "test_examples": 40,
        "images_per_second": pytest.approx(300 / 9),  # not 300 / 129: 120 s were evaluation
        "train_seconds": 9.0,
    }
    assert {key: summary[key] for key in expected} == expected
    assert isinstance(summary["test_examples"], int)
    json.dumps(summary)


def test_the_summary_names_the_versions(memory: Memory, clock: Clock) -> None:
    mxnet = pytest.importorskip("mxnet")
    horovod = pytest.importorskip("horovod")
    run_two_epochs(memory, clock).finish()
    assert (memory.summaries[0]["mxnet"], memory.summaries[0]["horovod"]) == (mxnet.__version__, horovod.__version__)


def test_every_writer_receives_every_record(memory: Memory, clock: Clock) -> None:
    second = Memory()
    recorder = Recorder([memory, second])
    clock.now += 1
    recorder.train(1, 0, Totals(1.0, 1.0, 1.0), 0.1)
    recorder.test(1, 0, Evaluation(1.0, 1.0, 1.0))
    recorder.finish()
    assert memory.records == second.records
    assert memory.summaries == second.summaries
    assert len(memory.records) == 2


def test_what_a_lost_host_had_recorded_since_the_last_checkpoint_another_one_records_again(
    memory: Memory, clock: Clock
) -> None:
    lost, other = Recorder([memory]), Recorder()  # rank 0, and a rank that has no writers
    for step in range(1, 5):
        clock.now += 1
        for rank in (lost, other):
            rank.train(step, 0, Totals(1.0 * step, 1.0, 1.0), 0.1)
            if step == 2:
                rank.sync()
    successor, rewritten = Recorder(), Rewritten()
    successor.load_state_dict(json.loads(json.dumps(other.state_dict())))
    assert successor.on_disk(4) == 2
    successor.go_on([rewritten])
    assert rewritten.again == memory.records[2:]
    assert [record["step"] for record in rewritten.again] == [3, 4]
    assert rewritten.records == [], "who has seen them need not see them again"
    successor.sync()
    assert successor.on_disk(4) == 4
    assert successor.state_dict()["unsafe"] == []


class Rewritten(Memory):
    def __init__(self) -> None:
        super().__init__()
        self.again: list[dict[str, Any]] = []

    def rewrite(self, record: dict[str, Any]) -> None:
        self.again.append(record)


def test_a_rank_without_writers_records_in_silence(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    recorder = Recorder([])
    clock.now += 1
    recorder.train(1, 0, Totals(1.0, 1.0, 1.0), 0.1)
    recorder.test(1, 0, Evaluation(1.0, 1.0, 1.0))
    recorder.finish()
    assert capsys.readouterr().out == ""


def test_every_record_says_how_many_ranks_there_are_and_what_else_was_known(memory: Memory, clock: Clock) -> None:
    recorder = Recorder([memory], ranks=3)
    clock.now += 1
    recorder.train(1, 0, Totals(1.0, 1.0, 1.0), 0.1, gradient_norm=2.5)
    recorder.test(1, 0, Evaluation(1.0, 1.0, 1.0))
    assert [record["ranks"] for record in memory.records] == [3, 3]
    assert memory.records[0]["gradient_norm"] == 2.5


def test_a_test_record_holds_the_confusion_and_the_worst_mistakes_as_json_can(memory: Memory, clock: Clock) -> None:
    evaluation = Evaluation(1.0, 1.0, 2.0, np.array([[1, 1], [0, 0]]), (Mistake(7, 0, 1, 3.5),))
    Recorder([memory]).test(1, 0, evaluation)
    kept = json.loads(json.dumps(memory.records[0]))
    assert kept["confusion"] == [[1, 1], [0, 0]]
    assert kept["mistakes"] == [{"image": 7, "true": 0, "predicted": 1, "loss": 3.5}]


def validate_twice_and_test(memory: Memory, clock: Clock) -> Recorder:
    recorder = Recorder([memory])
    for step, right in ((2, 30.0), (4, 20.0)):
        clock.now += 1
        recorder.train(step, step // 2 - 1, Totals(50.0 * step, 80.0, 100.0), 0.1)
        recorder.test(step, step // 2 - 1, Evaluation(10.0, right, 40.0), split="validation")
    recorder.test(4, 1, Evaluation(80.0, 90.0, 100.0))
    return recorder


def test_with_a_validation_set_it_chooses_the_best_and_the_test_set_is_told_once(memory: Memory, clock: Clock) -> None:
    recorder = validate_twice_and_test(memory, clock)
    assert recorder.score(4) == 0.5 and recorder.score(2) is None
    recorder.finish()
    (summary,) = memory.summaries
    expected = {
        "best_validation_accuracy": 0.75,
        "best_step": 2,
        "validation_accuracy": 0.5,
        "validation_examples": 40,
        "test_accuracy": 0.9,
        "test_loss": 0.8,
        "test_examples": 100,
        "steps": 4,
    }
    assert {key: summary[key] for key in expected} == expected
    assert "best_test_accuracy" not in summary


def test_the_test_after_a_validation_has_the_same_epoch_beside_it(memory: Memory, clock: Clock) -> None:
    validate_twice_and_test(memory, clock)
    validation, test = memory.records[-2:]
    assert (validation["split"], test["split"]) == ("validation", "test")
    assert validation["train_loss"] == test["train_loss"] == 2.0
    assert validation["train_accuracy"] == test["train_accuracy"] == 0.8


def test_a_run_that_goes_on_remembers_its_validations(memory: Memory, clock: Clock) -> None:
    whole = validate_twice_and_test(memory, clock)
    other = Recorder([second := Memory()])
    other.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    assert other.score(4) == 0.5
    whole.finish()
    other.finish()
    assert second.summaries == memory.summaries


def test_averaged_weights_are_told_beside_the_last_ones_and_choose_the_best(memory: Memory, clock: Clock) -> None:
    recorder = Recorder([memory])
    clock.now += 1
    recorder.train(1, 0, Totals(1.0, 1.0, 1.0), 0.1)
    recorder.test(1, 0, Evaluation(10.0, 30.0, 40.0), Evaluation(5.0, 32.0, 40.0))
    recorder.test(2, 1, Evaluation(10.0, 38.0, 40.0), Evaluation(5.0, 31.0, 40.0))
    assert (memory.records[1]["accuracy"], memory.records[1]["average_accuracy"]) == (0.75, 0.8)
    assert (memory.records[1]["loss"], memory.records[1]["average_loss"]) == (0.25, 0.125)
    assert recorder.score(2) == 31 / 40
    recorder.finish()
    (summary,) = memory.summaries
    assert (summary["best_test_accuracy"], summary["best_step"]) == (0.8, 1)
    assert (summary["test_accuracy"], summary["average_test_accuracy"]) == (0.95, 31 / 40)
    assert summary["average_test_loss"] == 0.125
