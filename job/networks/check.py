"""What can be known of a network before it is trained, without computing anything with it."""

from __future__ import annotations

import contextlib
import io

import mxnet as mx

from job.config import ModelConfig
from job.distributed.comm import Comm
from job.errors import UsageError
from job.networks import models
from job.networks.mixed_precision import in_float16
from job.networks.others import said
from job.networks.sharded_graph import write_sharded
from job.networks.weights import match
from job.operators.group import Group


def check(model: ModelConfig, classes: int = models.CLASSES, shape: tuple[int, int, int] = models.IMAGE_SHAPE) -> None:
    """Build the network, trace it, and follow the shapes through it.

    Raises:
        UsageError: it cannot be built, hybridized or sharded, does not turn such images into (N, classes), or is not
            the one that the weights to start from are of.
    """
    net = models.build(model, classes, shape)
    size = f"{shape[1]}x{shape[2]} with {shape[0]} channel{'s' * (shape[0] > 1)}"
    try:
        net.hybridize()
        symbol = net(mx.sym.var("data"))
    except Exception as error:
        raise UsageError(f"model.name={model.name}: cannot be hybridized: {said(error)}") from None
    if not isinstance(symbol, mx.sym.Symbol) or len(symbol.list_outputs()) != 1:
        raise UsageError(f"model.name={model.name}: gives several outputs, and one of shape (N, {classes}) is needed")
    try:
        write_sharded(symbol, 1, Group(Comm(), range(1), 1))
        if model.dtype == "float16":
            in_float16(symbol, mx.cpu())
    except UsageError as error:
        raise UsageError(f"model.name={model.name}: {error}") from None
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # where MXNet lists the arguments of what it refuses
            arguments, (found,), states = symbol.infer_shape(data=(2, *shape))
    except Exception as error:
        raise UsageError(f"model.name={model.name}: takes no images of {size}: {said(error)}") from None
    if found != (2, classes):
        raise UsageError(
            f"model.name={model.name}: makes (N, {', '.join(map(str, found[1:]))}) of images of {size}, and"
            f" (N, {classes}) is needed, a number for each class"
        )
    if model.weights:
        by_name = {
            **dict(zip(symbol.list_arguments(), arguments)),
            **dict(zip(symbol.list_auxiliary_states(), states)),
        }
        parameters = dict(net._collect_params_with_prefix().items())
        shapes = {place: by_name.get(parameter.name, parameter.shape) for place, parameter in parameters.items()}
        match(model.weights, shapes, {parameter.name: place for place, parameter in parameters.items()})
