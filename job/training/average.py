"""The exponential moving average of a network's weights, which is often better than the weights themselves."""

from __future__ import annotations

from typing import Any

import mxnet as mx
import numpy as np
from mxnet import gluon


class Average:
    """Follows the weights and the running statistics, by their place in the network: ``3.running_mean``.

    After update n it is ``d * average + (1 - d) * weights`` with ``d = min(decay, (1 + n) / (10 + n))``, so that the
    first weights, which are random, are soon forgotten (as in TensorFlow's ExponentialMovingAverage). It follows from
    the weights alone, of which all ranks have the same bits.

    Args:
        net: initialized.
        decay: above 0 and below 1.
    """

    def __init__(self, net: gluon.Block, decay: float) -> None:
        self._decay = decay
        self._parameters: dict[str, gluon.Parameter] = dict(net._collect_params_with_prefix().items())
        self._arrays = {place: parameter.data().copy() for place, parameter in self._parameters.items()}

    def update(self, updates: int) -> None:
        """Follow the weights, which have been updated so many times."""
        decay = min(self._decay, (1 + updates) / (10 + updates))
        for place, array in self._arrays.items():
            array *= decay
            array += (1 - decay) * self._parameters[place].data()

    def weights(self) -> dict[str, mx.nd.NDArray]:
        """The arrays by the names of their parameters. Not copies."""
        return {self._parameters[place].name: array for place, array in self._arrays.items()}

    def state_dict(self) -> dict[str, Any]:
        """Copies, by place."""
        return {place: array.asnumpy() for place, array in self._arrays.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there; from the weights as they are now, if the run had no average so far."""
        for place, array in self._arrays.items():
            array[:] = np.asarray(state[place]) if state else self._parameters[place].data()
