"""Weights to start from: what a file of a trained network has for this network, and what it has not."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple, Optional

import mxnet as mx
import numpy as np
from mxnet import gluon
from safetensors import SafetensorError, safe_open

from job.errors import UsageError
from job.networks.others import said

Shape = tuple[int, ...]
_SHOWN = 4  # names in a message


class Start(NamedTuple):
    """Where each array of a network comes from, by its place: ``3.running_mean``."""

    taken: dict[str, np.ndarray]
    fresh: list[str]  # drawn from the seed: the last layer, if it is of another shape
    unused: list[str]  # what the file has beside

    def __str__(self) -> str:
        said = f"{_some(self.taken)} taken"
        said += f"; {_some(self.fresh)} fresh, for another number of classes" if self.fresh else ""
        return said + (f"; {_some(self.unused)} in the file not used" if self.unused else "")


def load(net: gluon.HybridBlock, file: Path) -> Start:
    """Fill an initialized network with what ``file`` has for it.

    Raises:
        UsageError: the file cannot be read, or is of another network.
    """
    parameters = dict(net._collect_params_with_prefix().items())
    shapes = {place: parameter.shape for place, parameter in parameters.items()}
    start = match(file, shapes, {parameter.name: place for place, parameter in parameters.items()})
    for place, array in start.taken.items():
        parameters[place].set_data(mx.nd.array(array, dtype=parameters[place].dtype))
    return start


def match(file: Path, shapes: Mapping[str, Shape], places: Mapping[str, str]) -> Start:
    """Find out what a file has for a network. The last layer may be of another shape, and nothing else may be missing.

    Args:
        file: ``.safetensors``, or ``.params`` as MXNet, Gluon or a checkpoint writes them.
        shapes: of the network's arrays, by place, in the order of its layers.
        places: by the names that its parameters have in MXNet.

    Raises:
        UsageError: the file cannot be read, or is of another network.
    """
    arrays = {places.get(name, name): array for name, array in _read(file).items()}
    last = list(shapes)[-1].rpartition(".")[0]
    fits = {place: place in arrays and arrays[place].shape == shape for place, shape in shapes.items()}
    fresh = [place for place in shapes if place.rpartition(".")[0] == last] if not all(fits.values()) else []
    wrong = [place for place, fit in fits.items() if not fit and place not in fresh]
    if wrong or len(fresh) == len(shapes):
        place = (wrong or fresh)[0]
        found = f"has {_size(arrays[place].shape)}" if place in arrays else "is missing"
        raise UsageError(
            f"model.weights={file}: is of another network: {place} {found}, and {_size(shapes[place])} is needed"
            + (f"; {len(wrong) - 1} more do not fit" if len(wrong) > 1 else "")
            + f"; the file has {_some(arrays)}"
        )
    for place in shapes:
        if place not in fresh and not np.isfinite(arrays[place]).all():
            raise UsageError(f"model.weights={file}: {place} holds what is not a finite number")
    taken = {place: arrays[place] for place in shapes if place not in fresh}
    return Start(taken, fresh, [name for name in arrays if name not in shapes])


def _read(file: Path) -> dict[str, np.ndarray]:
    """The arrays by name: those of the network, if it is a checkpoint's, and without the kinds of Gluon's export."""
    if not os.path.isfile(file):
        raise UsageError(f"model.weights={file}: no such file: {os.path.abspath(file)}")
    try:
        arrays = _safetensors(file) if file.suffix == ".safetensors" else _params(file)
    except (SafetensorError, mx.MXNetError, OSError, TypeError, ValueError) as error:
        raise UsageError(f"model.weights={file}: cannot be read: {said(error)}") from None
    of_network = {name[len("network/") :]: array for name, array in arrays.items() if name.startswith("network/")}
    return of_network or {name.partition(":")[2] or name: array for name, array in arrays.items()}


def _safetensors(file: Path) -> dict[str, np.ndarray]:
    with safe_open(str(file), "numpy") as stored:
        return {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118


def _params(file: Path) -> dict[str, np.ndarray]:
    arrays: Optional[dict[str, mx.nd.NDArray]] = mx.nd.load(str(file))
    if not isinstance(arrays, dict):
        raise ValueError("its arrays have no names")
    return {name: array.asnumpy() for name, array in arrays.items()}


def _size(shape: Shape) -> str:
    return "x".join(map(str, shape))


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return f"{', '.join(listed[:_SHOWN])}{more}"
