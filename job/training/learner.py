"""Learning from a global batch, one step at a time, and exact evaluation."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, Optional

import mxnet as mx
import numpy as np
from mxnet import autograd, gluon

from job.config import Config, ModelConfig, OptimizerConfig
from job.data.dataset import Split
from job.data.sampler import Shard, Span, own_shards
from job.distributed.comm import Comm
from job.errors import DivergedError
from job.networks.mixed_precision import in_float16
from job.networks.shards import Inference, ShardedNetwork, dropout_mask
from job.operators import convolution_loops, fused, kernels
from job.operators.batch_norm import tails_for
from job.operators.compiled import load_kept
from job.operators.fused import can_fuse
from job.operators.group import Group
from job.training import augmentation, exact
from job.training.augmentation import Augmentation
from job.training.average import Average
from job.training.evaluation import Evaluation, evaluate
from job.training.feed import Feed
from job.training.loss_scale import LossScale
from job.training.metrics import Meter, Totals
from job.training.pace import Pace
from job.training.step_sums import StepSums

Micros = Sequence[Sequence[Shard]]  # a rank's shards of each micro-batch of a step
Feeds = list[dict[str, mx.nd.NDArray]]  # of each shard what the training graph takes, by name


def optimizer_options(optimizer: OptimizerConfig) -> tuple[str, dict[str, Any]]:
    """The name and the arguments by which MXNet knows the configured optimizer."""
    options: dict[str, Any] = {"learning_rate": optimizer.learning_rate, "wd": optimizer.weight_decay}
    if optimizer.name == "adam":
        return "adam", {**options, "beta1": optimizer.beta1, "beta2": optimizer.beta2, "epsilon": optimizer.epsilon}
    return ("nag" if optimizer.nesterov else "sgd"), {**options, "momentum": optimizer.momentum}


def cross_entropy(logits: Any, labels: Any, smoothing: float = 0.0) -> Any:
    """The loss of each sample, (n,), from logits (n, classes) and labels (n,); all of them arrays, or all symbols.

    With ``smoothing`` that much of the target is spread evenly over all classes (Szegedy et al., 2016, section 7).
    """
    F = mx.sym if isinstance(logits, mx.sym.Symbol) else mx.nd
    log_probabilities = F.log_softmax(logits)
    losses = -F.pick(log_probabilities, labels)
    if smoothing:
        losses = (1 - smoothing) * losses - smoothing * log_probabilities.mean(axis=1)
    return losses


def load_loops(augments: bool = False) -> None:
    """Load the compiled loops of a step, unless that is done; also those that augment images if it ``augments``."""
    load_kept(kernels, fused, convolution_loops, exact, *([augmentation] if augments else []))


class Learner:
    """A network and its optimizer, trained on global batches.

    Each shard's loss is the sum over its own samples divided by the size of the *global* batch. The sum of the shards'
    gradients is the gradient of the mean over the global batch, and it is summed exactly: in no order.

    Args:
        net: initialized; plain Gluon.
        comm: the ranks.
        feed: brings samples to the network.
        config: of the run; ``data.shards`` says into how many shards the global batch is cut, over all ranks.

    Raises:
        UsageError: the network cannot be trained shard by shard.
    """

    def __init__(self, net: gluon.HybridBlock, comm: Comm, feed: Feed, config: Config) -> None:
        load_loops(config.data.augment.changes)
        self.steps = 0  # taken, of the run
        self.skipped = 0  # of those, without an update
        self.stopping = False  # whether a rank has asked to stop; the same on all ranks after the same step
        self.net = net
        self.comm = comm
        self.feed = feed
        self._bring = feed.bring
        self.meter = Meter()
        self.pace = Pace(comm, feed.ctx)
        self._clip_norm = config.train.clip_gradient_norm
        self._micros = config.train.accumulate_steps
        self._seed = config.run.seed
        self._augment = Augmentation(config.data.augment, config.run.seed, feed.about)
        self._augments = config.data.augment.changes
        self._upcoming: Micros = []  # of the next step, if it is known
        self._ahead: Optional[tuple[Sequence[Shard], Feeds]] = None  # what is next, and on the device already
        self._skips = config.run.on_nonfinite == "skip"
        parameters = net.collect_params()
        for name, parameter in parameters.items():
            if not name.endswith("weight"):
                parameter.wd_mult = 0.0
        comm.broadcast_([parameter.data() for parameter in parameters.values()], comm.fresh_name("parameters"))
        # The gradients are those of the global batch's mean, so the trainer neither communicates nor rescales.
        self.trainer = gluon.Trainer(parameters, *optimizer_options(config.optimizer), kvstore=None)
        shards = config.data.shards
        own, model = own_shards(comm.rank, comm.size, shards), config.model
        self._group = Group(comm, own, shards, model.shards_of_statistics, model.unbiased_variance)
        self._scale = LossScale() if model.dtype == "float16" else None
        logits = net(mx.sym.var("data"))
        objective = _objective(in_float16(logits, feed.ctx) if self._scale else logits, config.train.label_smoothing)
        dtype = "float16" if self._scale else feed.dtype  # of activations
        self._network = ShardedNetwork(net, objective, ("data", "label"), self._group, *_own_loops(model, feed, dtype))
        self._inference = Inference(logits, *_own_loops(model, feed, feed.dtype))
        trained = [p for p in parameters.values() if p.name in self._network.gradients]
        self._weights, self._gradients = [p.data() for p in trained], [p.grad() for p in trained]
        self._statistics = [p.data() for p in parameters.values() if p.grad_req == "null"]
        self._parameters = dict(parameters.items())
        self._norms = [] if self._group.whole else self._network.graph.norms  # of statistics that are a shard's own
        self._sums = self._lay_out(
            [self._network.gradients[p.name] for p in trained], shards, config.train.fp16_allreduce
        )
        self._shares: dict[float, mx.nd.NDArray] = {}  # by value: one for the batches of an epoch, one for its last
        self._gradient_norm = math.nan
        self._change: mx.nd.NDArray | None = None
        decay = config.train.average_decay
        self.average = Average(net, decay) if decay is not None else None

    def step(
        self,
        split: Split,
        micros: Micros,
        global_batch: int,
        learning_rate: float,
        stop: bool = False,
        measure: bool = False,
    ) -> None:
        """Train on one global batch.

        Args:
            split: the training set.
            micros: this rank's shards of each micro-batch.
            global_batch: the number of samples in the batch, over all ranks and micro-batches.
            learning_rate: of this step.
            stop: whether this rank asks all ranks to stop; they all see it in ``stopping`` after this step.
            measure: whether :meth:`vitals` is to tell how far the step moves the weights, which takes a copy of them.

        Raises:
            DivergedError: a number that is summed is not finite, and such updates are not skipped. Nothing was updated.
        """
        self.pace.start()
        before = [array.copy() for array in self._statistics] if self._skips or self._scale else []
        self._sums.start(stop, self._scale.value if self._scale else 1.0)
        for number, shards in enumerate(micros):
            outcomes = self._backward(self._input(split, shards), global_batch)
            self._look_ahead(split, micros[number + 1 :])  # while that is computed
            self._sums.add(outcomes, global_batch, last=number + 1 == len(micros))
        self._reduce(sum(len(shard.samples) for shards in micros for shard in shards))
        self.steps += 1
        refused = self._sums.refused
        if refused and not (self._mends() or self._skips):
            raise DivergedError(
                f"step {self.steps}: {' and '.join(refused)} {'are' if len(refused) > 1 else 'is'} not finite, or too"
                f" large to go on with (more than {self._sums.limit:,.0f} in a shard); the last checkpoint is from"
                " before it. Lower optimizer.learning_rate (in the same run.dir with"
                " run.resume_ignoring=[optimizer.learning_rate]), set train.clip_gradient_norm, or drop such updates"
                " with run.on_nonfinite=skip" + ("; or train in model.dtype=float32" if self._scale else "")
            )
        if refused:
            self._undo(before)
            return
        if self._scale:
            self._scale.grow()
        self._learn(global_batch, learning_rate, measure)

    def ahead(self, steps: Iterable[tuple[int, Micros]]) -> Iterator[tuple[int, Micros]]:
        """The steps as they are, each with its number; and the input of the next one is made while one is computed."""
        current = None
        for following in chain(steps, [None]):
            self._upcoming = following[1] if following else []
            if current:
                yield current
            current = following

    def totals(self) -> Totals:
        """Loss and accuracy over the samples since the last call; the same on all ranks."""
        return self.meter.take()

    def vitals(self) -> dict[str, Any]:
        """What else is worth a look, beside loss and accuracy. All ranks call it together.

        ``gradient_norm`` is that of the last step, over all ranks and before clipping. ``update_ratio`` is the L2 norm
        of what the last step added to the weights, over the norm that they had; NaN if it was not measured or skipped.
        ``pace`` is that of each rank since the last call.
        """
        moved, weights = (math.nan, 1.0) if self._change is None else self._change.asnumpy().tolist()
        return {
            "gradient_norm": self._gradient_norm,
            "update_ratio": math.sqrt(moved / weights) if weights else math.nan,
            **({"loss_scale": self._scale.value, "skipped": self.skipped} if self._scale else {}),
            "pace": self.pace.gather(),
        }

    def evaluations(self, split: Split, chunk: int) -> tuple[Evaluation, Optional[Evaluation]]:
        """What :meth:`evaluate` finds with the weights, and with their moving average if there is one."""
        found = self.evaluate(split, chunk)
        return found, self.evaluate(split, chunk, self.average.weights()) if self.average else None

    def evaluate(self, split: Split, chunk: int, weights: Optional[dict[str, mx.nd.NDArray]] = None) -> Evaluation:
        """Loss and accuracy over every sample of ``split`` exactly once, in chunks of at most ``chunk`` samples.

        The chunks are the same for any number of ranks; each is computed by one rank. The weights are those of the
        network, unless others are given by the names of their parameters.
        """
        samples = Span(0, len(split.labels))
        total = -(-len(samples) // chunk)
        own = own_shards(self.comm.rank, self.comm.size, total)
        self._inference.load(weights or {name: parameter.data() for name, parameter in self._parameters.items()})
        outcomes = []
        for number in own:
            span = samples.part(number, total)
            images, labels = self.feed(split, slice(*span))
            logits = self._inference(images)
            outcomes.append((span.start, mx.nd.stack(cross_entropy(logits, labels), logits.argmax(axis=1))))
        chunks = [(first, *rows.asnumpy()) for first, rows in outcomes]  # waited for at the end
        return evaluate(self.comm, split.labels, own, chunks, total, len(self.feed.about.classes))

    def state_dict(self) -> dict[str, Any]:
        """How far the run is."""
        scale = {"loss_scale": self._scale.state_dict()} if self._scale else {}
        return {"steps": self.steps, "skipped": self.skipped, **scale}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._ahead = None
        self.steps, self.skipped = state["steps"], state["skipped"]
        if self._scale:
            self._scale.load_state_dict(state.get("loss_scale"))

    def _input(self, split: Split, shards: Sequence[Shard]) -> Feeds:
        """What the graph takes of the shards, as it was made ahead, or made now."""
        ahead, self._ahead = self._ahead, None
        return ahead[1] if ahead and ahead[0] is shards else self._fed(split, shards, self.steps)

    def _look_ahead(self, split: Split, rest: Micros) -> None:
        """Make the input of what is next: of the micro-batches that are left, or of the next step."""
        following, step = (rest, self.steps) if rest else (self._upcoming, self.steps + 1)
        if following:
            self._ahead = following[0], self._fed(split, following[0], step)

    def _backward(self, feeds: Feeds, global_batch: int) -> list[list[mx.nd.NDArray]]:
        """Forward and backward of shards, begun. Of each the sum of its losses, and how many samples are right."""
        with autograd.record():
            outcomes = self._network(feeds)
        share = self._share((self._scale.value if self._scale else 1) / global_batch)
        autograd.backward([losses for losses, _ in outcomes], [share] * len(outcomes))
        return outcomes

    def _share(self, value: float) -> mx.nd.NDArray:
        """What the sum of losses is multiplied with, (1,)."""
        if value not in self._shares:
            self._shares[value] = mx.nd.full((1,), value, self.feed.ctx, self.feed.dtype)
        return self._shares[value]

    def _fed(self, split: Split, shards: Sequence[Shard], step: int) -> Feeds:
        """What the graph takes of the shards in the step that follows ``step`` others."""
        samples = np.concatenate([shard.samples for shard in shards])

        def change(pixels: np.ndarray) -> np.ndarray:
            return self._augment(pixels, samples, shards[0].epoch)

        images, labels = self.feed(split, samples, change if self._augments else None)
        ends = np.cumsum([len(shard.samples) for shard in shards]).tolist()
        spans = [slice(end - len(shard.samples), end) for end, shard in zip(ends, shards)]
        feeds = [{"data": images[span], "label": labels[span]} for span in spans]
        for feed, shard in zip(feeds, shards):
            shapes = self._network.mask_shapes(data=feed["data"].shape, label=feed["label"].shape)
            for layer, (dropout, shape) in enumerate(zip(self._network.graph.dropouts, shapes)):
                mask = dropout_mask(dropout, shape, shard.first, self._seed, step, layer)
                feed[dropout.mask] = self._bring(np.asarray(mask, images.dtype))
        return feeds

    def _lay_out(self, gradients: Sequence[Sequence[mx.nd.NDArray]], shards: int, in_float16: bool) -> StepSums:
        channels = [self._parameters[norm.running_mean].data().size for norm in self._norms]
        moments = [2 * number * self._micros for number in channels]
        return StepSums(self.comm, gradients, moments, shards * self._micros, self.feed.dtype, in_float16=in_float16)

    def _reduce(self, images: int) -> None:
        for layer, norm in enumerate(self._norms):
            for micro, own in enumerate(self._group.take_moments(norm.key)):
                for values in own:
                    self._sums.add_moments(layer, micro * values.size, values.ravel())
        self._sums.reduce()
        self.pace.done()
        self.pace.count(images)
        self.stopping = self.stopping or self._sums.stops

    def _learn(self, global_batch: int, learning_rate: float, measure: bool) -> None:
        limit, self._gradient_norm = self._clip_norm, self._sums.gradient_norm
        scale = limit / max(self._gradient_norm, limit) if limit is not None else 1.0
        self._sums.write_gradients(self._gradients, scale)
        for weight in self._weights:
            weight._fresh_grad = True  # or the trainer takes its gradient for one that was forgotten
        self.meter.add(Totals(self._sums.loss * global_batch, self._sums.correct, global_batch))
        self._update_running_statistics()

        weights = [weight.copy() for weight in self._weights] if measure else []
        self.trainer.set_learning_rate(learning_rate)
        self.trainer.update(1)
        if self.average:
            self.average.update(self.steps - self.skipped)
        self._change = None
        if measure:
            moved = [weight - old for weight, old in zip(self._weights, weights)]
            self._change = mx.nd.concat(_squares(moved).sum(), _squares(weights).sum(), dim=0)

    def _update_running_statistics(self) -> None:
        """Where each shard has its own statistics, the running ones follow their mean over the shards."""
        for norm, sums in zip(self._norms, self._sums.moments()):
            means = sums.reshape(self._micros, 2, -1) / self._group.shards
            for name, values in zip((norm.running_mean, norm.running_var), means.swapaxes(0, 1)):
                running = self._parameters[name].data()
                for value in values:
                    running[:] = norm.momentum * running.asnumpy().astype(np.float64) + (1 - norm.momentum) * value

    def _mends(self) -> bool:
        """Whether only gradients were too large, and because of their scale, which is smaller from now on."""
        return self._scale is not None and self._sums.overflowed and self._scale.shrink()

    def _undo(self, statistics: list[mx.nd.NDArray]) -> None:
        """Leave no trace of a step but its number: no update, no running statistics, no loss in the metrics."""
        self._gradient_norm = math.nan
        for array, value in zip(self._statistics, statistics):
            array[:] = value
        self._change = None
        self.skipped += 1


def _own_loops(model: ModelConfig, feed: Feed, dtype: str) -> tuple[Collection[str], bool]:
    """For what :func:`~job.networks.sharded_graph.write_sharded` takes our own loops, if activations have that type."""
    tails = tails_for(feed.ctx, dtype) if model.fuse_batch_norm else ()
    return tails, can_fuse(feed.ctx, dtype) and model.direct_convolution


def _objective(logits: mx.sym.Symbol, smoothing: float) -> mx.sym.Symbol:
    """Of a shard: the sum of its samples' losses, and how many of them are classified right."""
    labels = mx.sym.var("label")
    losses = cross_entropy(logits, labels, smoothing)
    correct = mx.sym.BlockGrad(mx.sym.argmax(logits, axis=1) == labels)
    return mx.sym.Group([losses.sum(), correct.sum()])


def _squares(arrays: list[mx.nd.NDArray]) -> mx.nd.NDArray:
    """The sum of the squares of each array, (len(arrays),), in the arrays' type."""
    if arrays[0].dtype == np.float64:  # multi_sum_sq is float32, whatever it adds up
        return mx.nd.concat(*(array.square().sum() for array in arrays), dim=0)
    return mx.nd.multi_sum_sq(*arrays, num_arrays=len(arrays))
