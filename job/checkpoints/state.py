"""All that the future of a run depends on: the one list of it.

Whoever keeps a run keeps this list, on disk or in memory. What is not on it follows from the number of steps taken: the
position in the permutation, the order of samples and the learning rate.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any, Protocol

import mxnet as mx
import numpy as np
from mxnet import gluon

from job.checkpoints.store import weights_sha256
from job.errors import CheckpointError
from job.monitoring.recorder import Recorder
from job.training.learner import Learner

Arrays = dict[str, np.ndarray]


class Stateful(Protocol):
    """A part of a run. Its state is a dictionary of arrays and of what JSON can hold; the same on all ranks."""

    def state_dict(self) -> dict[str, Any]:
        """A copy of the state. All ranks call it together."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state, whatever the number of ranks that had it."""


class RunState:
    """The parts of a run by name, and their state as one."""

    def __init__(self, learner: Learner, recorder: Recorder, seed: int) -> None:
        self.learner = learner
        self.recorder = recorder
        self.parts: dict[str, Stateful] = {
            "progress": learner,
            "network": Network(learner.net),
            "optimizer": Optimizer(learner.net, learner.trainer),
            "train_metrics": learner.meter,
            "records": recorder,
            "generators": Generators(seed, learner),
        }
        if learner.average:
            self.parts["average"] = learner.average

    def state_dict(self) -> tuple[Arrays, dict[str, Any]]:
        """The arrays as ``part/name``, and the rest as ``{part: {name: value}}``."""
        arrays: Arrays = {}
        values: dict[str, Any] = {}
        for part, stateful in self.parts.items():
            state = stateful.state_dict()
            arrays.update({f"{part}/{name}": value for name, value in state.items() if isinstance(value, np.ndarray)})
            values[part] = {name: value for name, value in state.items() if not isinstance(value, np.ndarray)}
        return arrays, values

    def sha256(self) -> dict[str, str]:
        """Of the weights, and of their average if there is one: :func:`job.checkpoints.store.weights_sha256`."""
        hashed = {"weights_sha256": "network", "average_sha256": "average"}
        return {
            name: weights_sha256(self.parts[part].state_dict()) for name, part in hashed.items() if part in self.parts
        }

    def load_state_dict(self, arrays: Mapping[str, np.ndarray], values: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave.

        Raises:
            CheckpointError: it is the state of another network or optimizer.
        """
        for part, stateful in self.parts.items():
            own = {name[len(part) + 1 :]: array for name, array in arrays.items() if name.startswith(f"{part}/")}
            stateful.load_state_dict({**own, **values.get(part, {})})


class Network:
    """The weights and the running statistics, by their place in the network: ``3.running_mean``."""

    def __init__(self, net: gluon.Block) -> None:
        self._parameters = net._collect_params_with_prefix()

    def state_dict(self) -> dict[str, Any]:
        return {name: parameter.data().asnumpy() for name, parameter in self._parameters.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        _fill({name: parameter.data() for name, parameter in self._parameters.items()}, state)


class Optimizer:
    """The arrays of the optimizer, such as momentum, and how often it has updated."""

    def __init__(self, net: gluon.Block, trainer: gluon.Trainer) -> None:
        self._trainer = trainer
        places = {id(parameter): name for name, parameter in net._collect_params_with_prefix().items()}
        self._names = [places[id(parameter)] for parameter in trainer._params]

    def state_dict(self) -> dict[str, Any]:
        optimizer = self._trainer._optimizer
        counts = {self._names[index]: count for index, count in optimizer._index_update_count.items()}
        arrays = {name: array.asnumpy() for name, array in self._arrays().items()}
        return {**arrays, "updates": optimizer.num_update, "updates_by_parameter": counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        optimizer, updater = self._trainer._optimizer, self._trainer._updaters[0]
        optimizer.num_update = state["updates"]
        for name, count in state["updates_by_parameter"].items():  # of those that were ever updated
            index = self._names.index(name)
            optimizer._index_update_count[index] = count
            weight = self._trainer._params[index].data()
            updater.states[index] = optimizer.create_state_multi_precision(index, weight)
            updater.states_synced[index] = True
        _fill(self._arrays(), {name: value for name, value in state.items() if isinstance(value, np.ndarray)})

    def _arrays(self) -> dict[str, mx.nd.NDArray]:
        """MXNet keeps, for each parameter, nothing, an array, or a tuple of such.

        In the order of places: the trainer's own order is that of Gluon's names, in which batchnorm10 is before 9.
        """
        states = sorted(self._trainer._updaters[0].states.items(), key=lambda item: self._names[item[0]])
        return {
            f"{self._names[index]}.{place}": array
            for index, state in states
            for place, array in enumerate(state if isinstance(state, (tuple, list)) else (state,))
            if array is not None
        }


class Generators:
    """The random generators of Python and numpy, and MXNet's, whose state cannot be read.

    It is seeded anew from the seed and the step wherever a run goes on. Nothing in training draws from it: the masks of
    Dropout follow from the seed, the step and the sample's place in the batch.
    """

    def __init__(self, seed: int, learner: Learner) -> None:
        self._seed = seed
        self._learner = learner

    def state_dict(self) -> dict[str, Any]:
        name, keys, *rest = np.random.get_state(legacy=True)
        return {"python": random.getstate(), "numpy": [name, np.asarray(keys).tolist(), *rest]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        version, words, gauss = state["python"]
        random.setstate((version, tuple(words), gauss))
        np.random.set_state(tuple(state["numpy"]))
        mx.random.seed((self._seed + 1_000_003 * self._learner.steps) % 2**31)


def _fill(arrays: Mapping[str, mx.nd.NDArray], values: Mapping[str, np.ndarray]) -> None:
    """Copy values into arrays of the same names, shapes and types."""
    have = {name: (array.shape, np.dtype(array.dtype).name) for name, array in arrays.items()}
    given = {name: (value.shape, value.dtype.name) for name, value in values.items()}
    if have != given:
        differing = sorted(name for name in {*have, *given} if have.get(name) != given.get(name))
        raise CheckpointError(
            f"the checkpoint is of another network or optimizer: {', '.join(differing[:5])}"
            + (f" and {len(differing) - 5} more arrays differ" if len(differing) > 5 else " differ")
        )
    for name, array in arrays.items():
        array[:] = values[name]
