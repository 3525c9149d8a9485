"""A network large enough for buckets, on real ranks: what is summed while backward goes on, and what is learned."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Optional
from unittest import mock

import mxnet as mx
import numpy as np
import pytest
from mxnet.gluon import nn

from job import command
from job.distributed.comm import Comm, HorovodComm, peer_errors
from job.monitoring.profiler import Span, read_spans
from job.training.learner import Learner
from job.training.step_sums import StepSums
from tests.parallel.conftest import exit_codes
from tests.parallel.runs import sha256_of
from tests.unit.training.test_learner import learner, split, take_step

PATIENCE = 60.0
Total = Callable[[], np.ndarray]


def large(comm: Comm, micros: int = 1) -> Learner:
    """Of a network with two buckets. Its first layer, the last in backward, is a BatchNorm, which ranks sum for."""
    net = nn.HybridSequential()
    net.add(nn.BatchNorm(), nn.Dense(1340, activation="relu"), nn.Dense(1024, activation="relu"), nn.Dense(10))
    return learner(net, "float32", comm, {"accumulate_steps": micros}, momentum=0.5)


def hash_of(comm: Comm) -> str:
    """Of what is learned in two steps of two micro-batches."""
    trained = large(comm, micros=2)
    for samples in np.array_split(np.arange(40), 2):
        take_step(trained, split(40), np.array_split(samples, 2), 0.125)
    return sha256_of({name: p.data().asnumpy() for name, p in trained.net._collect_params_with_prefix().items()})


class Hold:
    """Holds the backward of the first layer up until ``then`` is done with the sum of the first bucket.

    That is a sum over all ranks of which backward has yet to end, so that without any overlap it is not even begun.
    """

    def __init__(self, comm: Comm, then: Callable[[Total], Any]) -> None:
        self.happened: list[str] = []
        self._comm, self._then = comm, then
        self._begin_sum = comm.begin_sum
        self._first: Optional[Total] = None
        self._begun = threading.Event()
        comm.begin_sum = self.begin_sum  # type: ignore[method-assign]

    def begin_sum(self, values: np.ndarray, name: str, *others: Any) -> Total:
        if name.endswith(".backward.0"):
            self.happened.append("backward of the first layer")
            if self._begun.wait(PATIENCE) and self._first:
                self._then(self._first)
                self.happened.append("the first bucket is summed")
            total = self._begin_sum(values, name, *others)
            return lambda: (total(), self.happened.append("backward of the first layer is done"))[0]
        total = self._begin_sum(values, name, *others)
        if name.startswith("exact sum"):
            self.happened.append("a bucket is begun")
            self._first = self._first or total
            self._begun.set()
        return total


def traced_step(comm: Comm, trace: str) -> tuple[list[str], list[Span]]:
    """What happened in a step, as the ranks' sums tell it and as MXNet's profiler does."""
    trained, file = large(comm), Path(f"{trace}.{comm.rank}.json")
    hold = Hold(comm, lambda total: total())
    mx.profiler.set_config(filename=str(file), profile_symbolic=True, profile_imperative=True, profile_api=False)
    mx.profiler.set_state("run")
    take_step(trained, split(20), [np.arange(20)], 0.125)
    mx.nd.waitall()
    mx.profiler.set_state("stop")
    mx.profiler.dump()
    return hold.happened, read_spans(file)


def on_two_ranks(comm: Comm, trace: str) -> tuple[str, Optional[str], list[str], list[Span]]:
    """The hash of what both learn, and of what one process learns that has one bucket; and :func:`traced_step`."""
    with mock.patch("job.training.learner.StepSums", partial(StepSums, bucket_bytes=2**40)):
        not_cut = None if comm.rank else hash_of(Comm())
    return (hash_of(comm), not_cut, *traced_step(comm, trace))


@pytest.fixture(scope="module")
def two_ranks(run_ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run_ranks(on_two_ranks, 2, trace=str(tmp_path_factory.mktemp("traces") / "trace"))


def test_the_first_bucket_is_summed_before_backward_of_the_first_layer_ends(two_ranks: Any) -> None:
    for *_, happened, spans in two_ranks:
        begins, ends = happened.index("a bucket is begun"), happened.index("backward of the first layer is done")
        assert begins < happened.index("the first bucket is summed") < ends
        assert happened[ends:] == ["backward of the first layer is done", "a bucket is begun"]
        spans = sorted(spans, key=lambda span: span.end)
        first, last = (span for span in spans if span.name == "horovod_allreduce")
        *_, backward = (span for span in spans if "sync_batch_norm" in span.name)
        assert first.end <= backward.end <= last.start


def test_buckets_change_no_bit_on_one_two_and_three_ranks(run_ranks: Any, two_ranks: Any) -> None:
    (of_two, of_one_not_cut, *_), (of_the_other, *_) = two_ranks
    assert of_two == of_the_other == of_one_not_cut
    assert run_ranks(hash_of, 3) == [of_two] * 3


def train_until_a_rank_dies() -> None:
    """The body of a script: rank 1 dies in the backward of the first layer, while rank 0 may still sum a bucket."""

    def run() -> None:
        comm = HorovodComm(timeout_seconds=60)
        trained = large(comm)
        if comm.rank == 1:
            Hold(comm, lambda total: os.kill(os.getpid(), signal.SIGKILL))
        with peer_errors(), comm.guard("training"):
            take_step(trained, split(20), [np.arange(20)], 0.125)

    command.run(run)


@pytest.mark.slow
@pytest.mark.fault(1)
def test_a_rank_that_dies_in_a_step_with_buckets_ends_the_others_with_the_usual_error(
    capfd: pytest.CaptureFixture[str],
) -> None:
    codes = exit_codes("from tests.parallel.test_step_sums import train_until_a_rank_dies as f; f()", 2, 120)
    said = capfd.readouterr().err
    assert codes == {0: 1, 1: -signal.SIGKILL}, said
    assert "error: rank 0: stopped, because another rank failed; its message says why" in said
    assert "Traceback" not in said
