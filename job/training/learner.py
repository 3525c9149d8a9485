"""Learning from a global batch, one step at a time, and exact evaluation."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from typing import Any, NamedTuple

import mxnet as mx
import numpy as np
from mxnet import autograd, gluon

from job.config import OptimizerConfig, TrainConfig
from job.data.idx import Split
from job.data.sampler import Span
from job.distributed.comm import Comm
from job.errors import DivergedError
from job.networks.models import CLASSES
from job.training.evaluation import Evaluation, evaluate
from job.training.metrics import Meter, Totals
from job.training.pace import Pace


def optimizer_options(optimizer: OptimizerConfig) -> tuple[str, dict[str, Any]]:
    """The name and the arguments by which MXNet knows the configured optimizer."""
    options: dict[str, Any] = {"learning_rate": optimizer.learning_rate, "wd": optimizer.weight_decay}
    if optimizer.name == "adam":
        return "adam", {**options, "beta1": optimizer.beta1, "beta2": optimizer.beta2, "epsilon": optimizer.epsilon}
    return ("nag" if optimizer.nesterov else "sgd"), {**options, "momentum": optimizer.momentum}


def cross_entropy(logits: mx.nd.NDArray, labels: mx.nd.NDArray, smoothing: float = 0.0) -> mx.nd.NDArray:
    """The loss of each sample, (n,), from logits (n, classes) and labels (n,).

    With ``smoothing`` that much of the target is spread evenly over all classes (Szegedy et al., 2016, section 7).
    """
    log_probabilities = mx.nd.log_softmax(logits)
    losses = -mx.nd.pick(log_probabilities, labels)
    if smoothing:
        losses = (1 - smoothing) * losses - smoothing * log_probabilities.mean(axis=1)
    return losses


class Feed(NamedTuple):
    """How samples reach the network: on which device and in which type."""

    ctx: mx.Context
    dtype: str

    def __call__(self, split: Split, samples: Any) -> tuple[mx.nd.NDArray, mx.nd.NDArray]:
        """Images (n, 1, 28, 28) in [0, 1] and labels (n,) of the samples with the given indices."""
        images = mx.nd.array(split.images[samples], ctx=self.ctx, dtype=np.uint8)  # scaled there: a quarter to copy
        labels = mx.nd.array(split.labels[samples], ctx=self.ctx, dtype=self.dtype)
        return images.expand_dims(1).astype(self.dtype) / 255, labels


class Verdict(NamedTuple):
    """What is known of a step when it is done: arrays that MXNet is still computing."""

    own: mx.nd.NDArray  # ready when this rank's own gradients are
    summed: mx.nd.NDArray  # ready when those of all ranks have been added up
    numbers: mx.nd.NDArray  # loss, votes to stop, squared norm of each gradient


class Learner:
    """A network and its optimizer, trained on global batches.

    Each rank computes the loss of its own samples divided by the size of the *global* batch. The sum of those
    gradients over the ranks is the gradient of the mean over the global batch, however unevenly it is shared.
    """

    def __init__(
        self,
        net: gluon.HybridBlock,
        comm: Comm,
        feed: Feed,
        train: TrainConfig,
        optimizer: OptimizerConfig,
        on_nonfinite: str = "stop",
    ) -> None:
        self.steps = 0  # taken, of the run
        self.skipped = 0  # of those, without an update
        self.stopping = False  # whether a rank has asked to stop; the same on all ranks after the same step
        self.net = net
        self.comm = comm
        self.feed = feed
        self.config = train
        self.meter = Meter(comm, "train metrics")
        parameters = net.collect_params()
        for name, parameter in parameters.items():
            if not name.endswith("weight"):
                parameter.wd_mult = 0.0
        comm.broadcast_([parameter.data() for parameter in parameters.values()], comm.fresh_name("parameters"))
        # Summed by comm and already divided by the global batch, so the trainer neither communicates nor rescales.
        self.trainer = gluon.Trainer(parameters, *optimizer_options(optimizer), kvstore=None)
        self._gradients = [p.grad() for p in parameters.values() if p.grad_req != "null"]
        self._gradients_name = comm.fresh_name("gradients")
        self._statistics = [p.data() for p in parameters.values() if p.grad_req == "null"]
        self._weights = [p.data() for p in parameters.values() if p.grad_req != "null"]
        self._skips = on_nonfinite == "skip"
        self._verdict: Verdict | None = None
        self._gradient_norm = math.nan
        self._change: mx.nd.NDArray | None = None
        self.pace = Pace(comm)

    def step(
        self,
        split: Split,
        shares: list[np.ndarray],
        global_batch: int,
        learning_rate: float,
        stop: bool = False,
        measure: bool = False,
    ) -> None:
        """Train on one global batch.

        Args:
            split: the training set.
            shares: this rank's samples of each micro-batch, as indices into ``split``.
            global_batch: the number of samples in the batch, over all ranks and micro-batches.
            learning_rate: of this step.
            stop: whether this rank asks all ranks to stop; they see it in ``stopping``, together, a step later.
            measure: whether :meth:`vitals` is to tell how far the step moves the weights, which takes a copy of them.

        Raises:
            DivergedError: of the step before, or of this one if updates that are not finite are skipped.
        """
        if self._verdict is None:
            self.pace.start()
        statistics = [array.copy() for array in self._statistics] if self._skips else []
        weights = [array.copy() for array in self._weights] if measure else []
        self._change = None
        accumulated, objective = None, 0.0
        for samples in shares:
            objective = self._backward(*self.feed(split, samples), global_batch) + objective
            if len(shares) > 1:
                # Not through grad_req="add", with which MXNet's own BatchNorm gets wrong gradients (mxnet#18499).
                accumulated = self._plus_gradients(accumulated)
        if accumulated is not None:
            self._set_gradients(accumulated)
        before, (self._verdict, squares) = self._verdict, self._sum_over_ranks(objective, stop)
        self._judge(before)  # Python may run one step ahead of the device, not more
        self.pace.count(sum(map(len, shares)))
        self.steps += 1
        if self._skips and not self._finite():
            self._undo(statistics, len(shares))
            return
        self._clip(squares)
        self.trainer.set_learning_rate(learning_rate)
        self.trainer.update(1)
        if measure:
            moved = [new - old for new, old in zip(self._weights, weights)]
            self._change = mx.nd.concat(_squares(moved).sum(), _squares(weights).sum(), dim=0)

    def settle(self) -> None:
        """Wait for the last step. Asked on all ranks after the same step.

        Raises:
            DivergedError: its loss or its gradient is not finite.
        """
        self._judge(self._verdict)
        self._verdict = None

    def totals(self) -> Totals:
        """Loss and accuracy over the samples since the last call, on all ranks.

        Raises:
            DivergedError: the last step's loss or gradient is not finite.
        """
        self.settle()
        return self.meter.reduce()

    def vitals(self) -> dict[str, Any]:
        """What else is worth a look, beside loss and accuracy. All ranks call it together, when the step is settled.

        ``gradient_norm`` is that of the last step, over all ranks and before clipping. ``update_ratio`` is the L2 norm
        of what the last step added to the weights, over the norm that they had; NaN if it was not measured or skipped.
        ``pace`` is that of each rank since the last call.
        """
        moved, weights = (math.nan, 1.0) if self._change is None else self._change.asnumpy().tolist()
        return {
            "gradient_norm": self._gradient_norm,
            "update_ratio": math.sqrt(moved / weights) if weights else math.nan,
            "pace": self.pace.gather(),
        }

    def state_dict(self) -> dict[str, Any]:
        """How far the run is."""
        return {"steps": self.steps, "skipped": self.skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.steps, self.skipped = state["steps"], state["skipped"]

    def _backward(self, images: mx.nd.NDArray, labels: mx.nd.NDArray, global_batch: int) -> mx.nd.NDArray:
        with autograd.record():
            logits = self.net(images)
            losses = cross_entropy(logits, labels, self.config.label_smoothing)
            objective = losses.sum() / global_batch
        objective.backward()
        self.meter.add(losses, logits, labels)
        return objective

    def _sum_over_ranks(self, objective: mx.nd.NDArray, stop: bool) -> tuple[Verdict, mx.nd.NDArray]:
        """Sum the gradients. What the ranks then know together, and of that the squared norm of each gradient."""
        own = self._gradients[0].slice_axis(axis=0, begin=0, end=1)  # backward comes to the first layer last
        votes = mx.nd.concat(objective.reshape((1,)), mx.nd.full((1,), stop, objective.context, objective.dtype), dim=0)
        self.comm.allreduce_([*self._gradients, votes], self._gradients_name)  # travels with them, and costs nothing
        squares = _squares(self._gradients)
        return Verdict(own, votes, mx.nd.concat(votes.astype(squares.dtype), squares, dim=0)), squares

    def _judge(self, verdict: Verdict | None) -> None:
        if verdict is None:
            return
        verdict.own.wait_to_read()
        ready = time.perf_counter()
        verdict.summed.wait_to_read()
        self.pace.done(time.perf_counter() - ready)
        loss, votes, *squares = verdict.numbers.asnumpy().tolist()
        self._gradient_norm = math.sqrt(sum(squares))
        self.stopping = self.stopping or votes > 0
        if not math.isfinite(loss + sum(squares)):
            step = self.steps
            raise DivergedError(
                f"step {step}: the loss is {loss:g} and the gradient's norm {self._gradient_norm:g}; the last"
                " checkpoint is from before it. Lower optimizer.learning_rate (in the"
                " same run.dir with run.resume_ignoring=[optimizer.learning_rate]), set train.clip_gradient_norm, or"
                " drop such updates with run.on_nonfinite=skip"
            )

    def _finite(self) -> bool:
        try:
            self.settle()
        except DivergedError:
            self._verdict = None
            return False
        return True

    def _undo(self, statistics: list[mx.nd.NDArray], additions: int) -> None:
        """Leave no trace of a step but its number: no update, no running statistics, no loss in the metrics."""
        for array, value in zip(self._statistics, statistics):
            array[:] = value
        self.meter.drop(additions)
        self.skipped += 1

    def _plus_gradients(self, accumulated: list[mx.nd.NDArray] | None) -> list[mx.nd.NDArray]:
        if accumulated is None:
            return [gradient.copy() for gradient in self._gradients]
        return [total + gradient for total, gradient in zip(accumulated, self._gradients)]

    def _set_gradients(self, values: Iterable[mx.nd.NDArray]) -> None:
        for gradient, value in zip(self._gradients, values):
            gradient[:] = value

    def _clip(self, squares: mx.nd.NDArray) -> None:
        limit = self.config.clip_gradient_norm
        if limit is not None:
            scale = limit / mx.nd.maximum(squares.sum().sqrt(), limit)
            self._set_gradients(mx.nd.broadcast_mul(g, scale.reshape((1,) * g.ndim)) for g in self._gradients)

    def evaluate(self, split: Split, batch_per_rank: int) -> Evaluation:
        """Loss and accuracy over every sample of ``split`` exactly once, each on one rank."""
        own = Span(0, len(split.labels)).part(self.comm.rank, self.comm.size)
        batches = -(-len(own) // batch_per_rank)
        outcomes = []
        for index in range(batches):
            images, labels = self.feed(split, slice(*own.part(index, batches)))
            logits = self.net(images)
            outcomes.append(mx.nd.stack(cross_entropy(logits, labels), logits.argmax(axis=1)))
        # Waited for at the end; a rank may have no samples.
        losses, predicted = np.concatenate([np.zeros((2, 0)), *(rows.asnumpy() for rows in outcomes)], axis=1)
        return evaluate(self.comm, split.labels, own.start, losses, predicted, CLASSES)


def _squares(arrays: list[mx.nd.NDArray]) -> mx.nd.NDArray:
    """The sum of the squares of each array, (len(arrays),), in the arrays' type."""
    if arrays[0].dtype == np.float64:  # multi_sum_sq is float32, whatever it adds up
        return mx.nd.concat(*(array.square().sum() for array in arrays), dim=0)
    return mx.nd.multi_sum_sq(*arrays, num_arrays=len(arrays))
