"""The tutorial's plain loop: one process, a network that is not hybridized, loss and accuracy asked for at each batch.

MXNet takes as many threads as it takes by default. The data lies in memory, as one array that is shuffled an epoch.
"""

import mxnet as mx
import numpy as np
from mxnet import autograd, gluon, nd
from mxnet.gluon import nn

from benchmarks.peers.turns import GLOBAL_BATCH, LEARNING_RATE, MODE, load, steps, take_turns

mx.random.seed(0)
np.random.seed(0)
net = nn.Sequential()
net.add(
    nn.Conv2D(20, kernel_size=5), nn.BatchNorm(), nn.Activation("relu"), nn.MaxPool2D(2, 2),
    nn.Conv2D(50, kernel_size=3), nn.BatchNorm(), nn.Activation("relu"), nn.MaxPool2D(2, 2),
    nn.Flatten(), nn.Dense(128, activation="relu"), nn.Dense(10),
)  # fmt: skip
net.initialize(mx.init.Normal(0.01))
trainer = gluon.Trainer(net.collect_params(), "sgd", {"learning_rate": LEARNING_RATE})
loss_of = gluon.loss.SoftmaxCrossEntropyLoss()
images, labels = load("train")
test_images, test_labels = load("t10k")
epochs = 0


def batches(images: np.ndarray, labels: np.ndarray, shuffle: bool):  # type: ignore[no-untyped-def]
    """Images (n, 1, 28, 28) in [0, 1] and labels."""
    order = np.random.permutation(len(labels)) if shuffle else np.arange(len(labels))
    pixels, classes = nd.array(images[order], dtype="uint8"), nd.array(labels[order])
    for first in range(0, len(labels), GLOBAL_BATCH):
        data = pixels[first : first + GLOBAL_BATCH].astype("float32").expand_dims(1) / 255
        yield data, classes[first : first + GLOBAL_BATCH]


def train_step(data: nd.NDArray, label: nd.NDArray) -> tuple[float, float]:
    """One step; its loss and accuracy."""
    with autograd.record():
        output = net(data)
        loss = loss_of(output, label)
    loss.backward()
    trainer.step(data.shape[0])
    return loss.mean().asscalar(), (output.argmax(axis=1) == label).mean().asscalar()


def epoch() -> None:
    """Train, evaluate, print."""
    global epochs
    found = np.array([train_step(*batch) for batch in batches(images, labels, True)]).mean(axis=0)
    right = sum((net(x).argmax(axis=1) == y).sum().asscalar() for x, y in batches(test_images, test_labels, False))
    print(f"epoch {epochs} loss {found[0]:.4f} train {found[1]:.4f} test {right / len(test_labels):.4f}", flush=True)
    epochs += 1


ready = list(batches(images[: 64 * GLOBAL_BATCH], labels[: 64 * GLOBAL_BATCH], True)) if MODE == "step" else []


def step(number: int) -> None:
    """On a batch that lies ready."""
    train_step(*ready[number % 64])


def warm_up() -> None:
    """What MXNet does once."""
    for data, label in batches(images[: 8 * GLOBAL_BATCH], labels[: 8 * GLOBAL_BATCH], False):
        train_step(data, label)


take_turns(steps(step, nd.waitall) if MODE == "step" else epoch, warm_up)
