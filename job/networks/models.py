"""The networks, by name."""

from __future__ import annotations

import warnings

import mxnet as mx
from mxnet import gluon, init
from mxnet.gluon import nn

from job.config import ModelConfig
from job.networks import others

CLASSES = 10
IMAGE_SHAPE = (1, 28, 28)


def build(model: ModelConfig, classes: int = CLASSES, shape: tuple[int, int, int] = IMAGE_SHAPE) -> gluon.HybridBlock:
    """The network that ``model`` names, uninitialized: of (N, channels, height, width) it makes (N, classes).

    Raises:
        UsageError: there is no such network, or it cannot be made with these options.
    """
    if not model.is_tutorial:
        return others.build(model, classes, shape)
    return tutorial(model.name == "tutorial", model.dense_batch_norm, classes)


def tutorial(batch_norm: bool = True, dense_batch_norm: bool = False, classes: int = CLASSES) -> nn.HybridSequential:
    """The network of the Gluon BatchNorm tutorial. The shapes are those of an image of 28x28, without the batch axis.

    Args:
        batch_norm: whether the convolutions are normalized.
        dense_batch_norm: the tutorial's exercise: whether the dense layer is normalized too.
        classes: how many there are to tell apart.
    """
    net = nn.HybridSequential()
    net.add(nn.Conv2D(20, kernel_size=5))  # 20x24x24
    if batch_norm:
        net.add(nn.BatchNorm())
    net.add(nn.Activation("relu"), nn.MaxPool2D(2, 2))  # 20x12x12
    net.add(nn.Conv2D(50, kernel_size=3))  # 50x10x10
    if batch_norm:
        net.add(nn.BatchNorm())
    net.add(nn.Activation("relu"), nn.MaxPool2D(2, 2), nn.Flatten())  # 1250
    net.add(nn.Dense(128))
    if dense_batch_norm:
        net.add(nn.BatchNorm())
    net.add(nn.Activation("relu"), nn.Dense(classes))
    return net


def initialize(
    net: gluon.HybridBlock, ctx: mx.Context, dtype: str = "float32", shape: tuple[int, int, int] = IMAGE_SHAPE
) -> None:
    """Draw the weights from Normal(0, 0.01), the tutorial's choice. What is initialized already stays as it is."""
    net.cast(dtype)
    with warnings.catch_warnings():  # of parameters that are initialized
        warnings.simplefilter("ignore")
        net.initialize(init.Normal(sigma=0.01), ctx=ctx)
    net.hybridize(static_alloc=True, static_shape=True)  # first: SyncBatchNorm refuses to be traced for another plan
    # The shapes that Gluon defers are worked out, not tried: inference on a CPU reorders weights where they lie.
    net.infer_shape(mx.nd.zeros((1, *shape), ctx=ctx, dtype=dtype))
    for parameter in net.collect_params().values():
        parameter._finish_deferred_init()
