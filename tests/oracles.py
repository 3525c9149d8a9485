"""BatchNorm in plain numpy and float64: what every other implementation is measured against."""

from __future__ import annotations

from typing import NamedTuple, Optional

import numpy as np


class Expected(NamedTuple):
    """What BatchNorm gives for one batch in training mode."""

    y: np.ndarray
    dx: np.ndarray
    dgamma: np.ndarray
    dbeta: np.ndarray
    mean: np.ndarray
    var: np.ndarray
    dx_scale: float  # the size of the terms whose difference dx is


def batch_norm(
    x: np.ndarray, dy: np.ndarray, axis: int, eps: float, gamma: Optional[np.ndarray], beta: Optional[np.ndarray]
) -> Expected:
    """Forward and backward over the whole of ``x``, from the definitions, with nothing clever."""
    x, dy = x.astype(np.float64), dy.astype(np.float64)
    others = tuple(index for index in range(x.ndim) if index != axis % x.ndim)
    wide = [1] * x.ndim
    wide[axis] = -1
    mean, var = x.mean(others), x.var(others)
    gamma = np.ones_like(mean) if gamma is None else gamma.astype(np.float64)
    beta = np.zeros_like(mean) if beta is None else beta.astype(np.float64)
    std = np.sqrt(var + eps).reshape(wide)
    normalized = (x - mean.reshape(wide)) / std
    factor = gamma.reshape(wide) / std
    dx = factor * (dy - dy.mean(others, keepdims=True) - normalized * (dy * normalized).mean(others, keepdims=True))
    return Expected(
        y=gamma.reshape(wide) * normalized + beta.reshape(wide),
        dx=dx,
        dgamma=(dy * normalized).sum(others),
        dbeta=dy.sum(others),
        mean=mean,
        var=var,
        dx_scale=float(np.abs(factor * dy).max()),
    )


def assert_within(actual: np.ndarray, expected: np.ndarray, tolerance: float, what: str, scale: float = 0.0) -> None:
    """The largest difference is at most ``tolerance`` times the largest value, or ``scale`` if that is larger."""
    scale = max(float(np.abs(expected).max()), scale, 1e-30)
    error = float(np.abs(np.asarray(actual, np.float64) - expected).max())
    assert error <= tolerance * scale, f"{what}: off by {error:.3g}, allowed {tolerance * scale:.3g}"
