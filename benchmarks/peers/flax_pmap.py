"""Flax on two host devices, BatchNorm over their axis: as in Flax's ImageNet example, whose statistics are global.

XLA makes two devices of the CPU with ``XLA_FLAGS=--xla_force_host_platform_device_count=2``.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import jax_utils
from flax import linen as nn
from flax.training import train_state

from benchmarks.peers.turns import GLOBAL_BATCH, LEARNING_RATE, LOG_EVERY_STEPS, MODE, load, steps, take_turns

DEVICES = jax.local_device_count()
NORMAL = nn.initializers.normal(0.01)


class Net(nn.Module):
    """Images (n, 28, 28, 1) to logits (n, 10)."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        for channels, kernel in ((20, 5), (50, 3)):
            x = nn.Conv(channels, (kernel, kernel), padding="VALID", kernel_init=NORMAL)(x)
            x = nn.BatchNorm(use_running_average=not train, momentum=0.9, axis_name="batch" if train else None)(x)
            x = nn.max_pool(nn.relu(x), (2, 2), strides=(2, 2))
        x = nn.relu(nn.Dense(128, kernel_init=NORMAL)(x.reshape((x.shape[0], -1))))
        return nn.Dense(10, kernel_init=NORMAL)(x)


class State(train_state.TrainState):
    batch_stats: Any


@functools.partial(jax.pmap, axis_name="batch", donate_argnums=0)
def train_step(state: State, images: jax.Array, labels: jax.Array) -> tuple[State, jax.Array, jax.Array]:
    """One step; its loss, and the part that is right."""

    def loss_of(params: Any) -> tuple[jax.Array, Any]:
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, new = state.apply_fn(variables, images.astype(jnp.float32) / 255, True, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), (logits, new["batch_stats"])

    (loss, (logits, batch_stats)), gradients = jax.value_and_grad(loss_of, has_aux=True)(state.params)
    gradients, loss = jax.lax.pmean((gradients, loss), "batch")
    right = jax.lax.pmean((logits.argmax(-1) == labels).mean(), "batch")
    return state.apply_gradients(grads=gradients, batch_stats=batch_stats), loss, right


@functools.partial(jax.pmap, axis_name="batch")
def evaluate(state: State, images: jax.Array, labels: jax.Array) -> jax.Array:
    """How many are right."""
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    logits = state.apply_fn(variables, images.astype(jnp.float32) / 255, False)
    return jax.lax.psum((logits.argmax(-1) == labels).sum(), "batch")


net = Net()
variables = net.init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)), train=False)
state = jax_utils.replicate(
    State.create(
        apply_fn=net.apply,
        params=variables["params"],
        tx=optax.sgd(LEARNING_RATE),
        batch_stats=variables["batch_stats"],
    )
)
images, labels = load("train")
test_images, test_labels = load("t10k")
generator = np.random.default_rng(0)
epochs = 0


def shared_out(images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A batch with the devices as its first axis."""
    return images.reshape(DEVICES, -1, 28, 28, 1), labels.reshape(DEVICES, -1).astype(np.int32)


def epoch() -> None:
    """Train, log, evaluate. The last batch, which is smaller, would be compiled anew: it is left out, as is usual."""
    global state, epochs
    order = generator.permutation(len(labels))[: len(labels) // GLOBAL_BATCH * GLOBAL_BATCH].reshape(-1, GLOBAL_BATCH)
    for number, batch in enumerate(order):
        state, loss, right = train_step(state, *shared_out(images[batch], labels[batch]))
        if number % LOG_EVERY_STEPS == 0:
            print(f"epoch {epochs} step {number} loss {float(loss[0]):.4f} right {float(right[0]):.4f}", flush=True)
    found = [
        evaluate(state, *shared_out(test_images[first : first + 1000], test_labels[first : first + 1000]))[0]
        for first in range(0, len(test_labels), 1000)
    ]
    print(f"epoch {epochs} test accuracy {sum(map(int, found)) / len(test_labels):.4f}", flush=True)
    epochs += 1


ready = [
    shared_out(images[first : first + GLOBAL_BATCH], labels[first : first + GLOBAL_BATCH])
    for first in range(0, 64 * GLOBAL_BATCH, GLOBAL_BATCH)
]


def step(number: int) -> None:
    """On a batch that lies ready."""
    global state
    state, _, _ = train_step(state, *ready[number % 64])


turn = steps(step, lambda: jax.block_until_ready(state.params))
if MODE == "epoch":
    evaluate(state, *shared_out(test_images[:1000], test_labels[:1000]))  # compiles
take_turns(turn if MODE == "step" else epoch, lambda: [turn() for _ in range(3)])
