"""Horovod's own recipe for Gluon: DistributedTrainer, MNISTIter, BatchNorm of each rank. Started by mpirun."""

import os
from pathlib import Path

import horovod.mxnet as hvd
import mxnet as mx
from mxnet import autograd, gluon
from mxnet.gluon import nn

from benchmarks.peers.turns import GLOBAL_BATCH, LEARNING_RATE, LOG_EVERY_STEPS, MODE, steps, take_turns

hvd.init()
batch = GLOBAL_BATCH // hvd.size()
folder = Path(os.environ["BENCH_DATA"])
mx.random.seed(0)


def iterator(part: str, shuffle: bool) -> mx.io.MNISTIter:
    """This rank's part of the data, which it holds in memory."""
    return mx.io.MNISTIter(
        image=str(folder / f"{part}-images-idx3-ubyte"),
        label=str(folder / f"{part}-labels-idx1-ubyte"),
        batch_size=batch,
        shuffle=shuffle,
        num_parts=hvd.size() if shuffle else 1,
        part_index=hvd.rank() if shuffle else 0,
        silent=True,
    )


def build() -> nn.HybridSequential:
    """The tutorial's network."""
    net = nn.HybridSequential()
    net.add(
        nn.Conv2D(20, 5, in_channels=1), nn.BatchNorm(in_channels=20), nn.Activation("relu"), nn.MaxPool2D(2, 2),
        nn.Conv2D(50, 3, in_channels=20), nn.BatchNorm(in_channels=50), nn.Activation("relu"), nn.MaxPool2D(2, 2),
        nn.Flatten(), nn.Dense(128, "relu", in_units=1250), nn.Dense(10, in_units=128),
    )  # fmt: skip
    net.initialize(mx.init.Normal(0.01))
    net.hybridize(static_alloc=True, static_shape=True)
    return net


net = build()
parameters = net.collect_params()
hvd.broadcast_parameters(parameters, root_rank=0)
trainer = hvd.DistributedTrainer(parameters, mx.optimizer.create("sgd", learning_rate=LEARNING_RATE))
loss_of = gluon.loss.SoftmaxCrossEntropyLoss()
train_data, test_data = iterator("train", True), iterator("t10k", False)
metric = mx.metric.Accuracy()
epochs = 0


def train_step(data: mx.nd.NDArray, label: mx.nd.NDArray) -> mx.nd.NDArray:
    """One step; its logits."""
    with autograd.record():
        output = net(data)
        loss = loss_of(output, label)
    loss.backward()
    trainer.step(batch)
    return output


def epoch() -> None:
    """Train, log; every rank evaluates everything."""
    global epochs
    train_data.reset()
    metric.reset()
    for number, found in enumerate(train_data, start=1):
        metric.update([found.label[0]], [train_step(found.data[0], found.label[0])])
        if number % LOG_EVERY_STEPS == 0 and hvd.rank() == 0:
            print(f"epoch {epochs} step {number} {metric.get()}", flush=True)
    test_data.reset()
    metric.reset()
    for found in test_data:
        metric.update([found.label[0]], [net(found.data[0])])
    if hvd.rank() == 0:
        print(f"epoch {epochs} test {metric.get()}", flush=True)
    epochs += 1


def next_batch() -> mx.io.DataBatch:
    """Of an iterator without an end."""
    if not train_data.iter_next():
        train_data.reset()
        train_data.iter_next()
    return train_data


def step(number: int) -> None:
    """On the next batch of the iterator, which has its own thread."""
    found = next_batch()
    train_step(found.getdata(), found.getlabel())


def barrier() -> None:
    """All ranks are here."""
    mx.nd.waitall()
    hvd.allreduce(mx.nd.zeros((1,)), name="barrier").wait_to_read()


turn = steps(step, mx.nd.waitall)
take_turns(turn if MODE == "step" else epoch, lambda: [turn() for _ in range(3)], hvd.rank(), barrier)
hvd.shutdown()
