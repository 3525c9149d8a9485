"""A small network for small images that is more accurate than the tutorial's: that of ``configs/best.yaml``."""

from __future__ import annotations

from collections.abc import Sequence

from mxnet.gluon import nn


def compact(
    classes: int,
    stages: Sequence[Sequence[int]] = ((32, 32), (64, 64), (128, 128)),
    hidden: int = 256,
    dropout: float = 0.3,
) -> nn.HybridSequential:
    """Stages of convolutions with BatchNorm and ReLU, each with 2x2 max pooling at its end, and a dense layer.

    The shapes are those of an image of 28x28, without the batch axis. Most of the arithmetic is where an operator is
    fast: with 32 channels and more, and each BatchNorm is one operator with what is behind it.

    Args:
        classes: how many there are to tell apart.
        stages: the channels of each convolution of each stage. The very first is of 5x5, the others are of 3x3.
        hidden: units of the dense layer.
        dropout: of what it reads.
    """
    net = nn.HybridSequential()
    kernel = 5
    for stage in stages:
        for width in stage:
            net.add(nn.Conv2D(width, kernel, padding=kernel // 2, use_bias=False))  # 32x28x28, 64x14x14, 128x7x7
            net.add(nn.BatchNorm(), nn.Activation("relu"))
            kernel = 3
        net.add(nn.MaxPool2D(2, 2))  # 32x14x14, 64x7x7, 128x3x3
    net.add(nn.Flatten(), nn.Dropout(dropout))  # 1152
    net.add(nn.Dense(hidden, use_bias=False), nn.BatchNorm(), nn.Activation("relu"), nn.Dense(classes))
    return net
