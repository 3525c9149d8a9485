"""Networks with options: ``compact``, those of MXNet's model zoo, by name, and the user's own, from a file."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Callable
from typing import Any

import mxnet as mx
from mxnet import gluon, init
from mxnet.gluon.model_zoo import vision

from job.config import ModelConfig
from job.errors import UsageError
from job.networks.compact import compact

SMALL = 64  # pixels of the shorter side: below it the zoo's ResNets get their stem for small images
_HELPERS = {"get_model", "get_mobilenet", "get_mobilenet_v2", "get_resnet", "get_vgg"}


def build(model: ModelConfig, classes: int, shape: tuple[int, int, int]) -> gluon.HybridBlock:
    """The network that ``model`` names. What it does not initialize by itself is to be drawn as He et al. (2015) do.

    Raises:
        UsageError: there is no such file, function or name, or it gives no HybridBlock for these options.
    """
    function = _of_file(model.name) if ":" in model.name else _of_zoo(model.name)
    options = dict(model.options)
    if ":" not in model.name:
        if refused := {"pretrained", "ctx", "root", "classes"} & {*options}:
            raise UsageError(f"model.options: {model.name} takes no {' or '.join(sorted(refused))} here")
        options["classes"] = classes
        if model.name.startswith("resnet") and min(shape[1:]) < SMALL:
            options.setdefault("thumbnail", True)
    given = () if "classes" in options else (classes,)
    with mx.name.NameManager():  # the same names, however many networks were built before
        try:
            if ":" in model.name:
                inspect.signature(function).bind(*given, **options)
            net = function(*given, **options)
        except Exception as error:
            raise UsageError(f"model.name={model.name}: cannot be built: {said(error)}; see model.options") from None
    if not isinstance(net, gluon.HybridBlock):
        raise UsageError(f"model.name={model.name}: gives a {type(net).__name__}, and a HybridBlock is needed")
    for parameter in net.collect_params().values():
        if parameter.init is None and parameter.name.endswith("weight"):
            parameter.init = init.Xavier(rnd_type="gaussian", factor_type="in", magnitude=2)
    return net


def names() -> list[str]:
    """What the zoo has."""
    found = (name for name, value in vars(vision).items() if inspect.isfunction(value) and not name.startswith("_"))
    return sorted(name for name in found if name not in _HELPERS)


def _of_zoo(name: str) -> Callable[..., Any]:
    if name == "compact":
        return compact
    if name not in names():
        close = difflib.get_close_matches(name, names(), n=1, cutoff=0.6)
        hint = f"did you mean {close[0]}?" if close else f"the zoo has {', '.join(names())}"
        raise UsageError(f"model.name={name}: no such network; {hint} Your own is FILE.py:FUNCTION")
    return getattr(vision, name)


def _of_file(name: str) -> Callable[..., Any]:
    file, _, function = name.rpartition(":")
    if not os.path.isfile(file):
        raise UsageError(f"model.name={name}: no such file: {os.path.abspath(file)}")
    spec = importlib.util.spec_from_file_location("network_of_the_user", file)
    assert spec and spec.loader  # of a file in .py
    module = importlib.util.module_from_spec(spec)
    beside = os.path.dirname(os.path.abspath(file))
    if beside not in sys.path:
        sys.path.append(beside)  # for what the file imports from its own folder
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UsageError(f"model.name={name}: {file} cannot be loaded: {said(error)}") from None
    found = getattr(module, function, None)
    if not callable(found):
        own = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise UsageError(f"model.name={name}: {file} has no function {function}; it has {', '.join(own) or 'none'}")
    return found


def said(error: Exception) -> str:
    """What an exception of foreign code says, in one line: MXNet adds a stack."""
    if found := re.search(r"Error in operator ([^:]+):.*Check failed: (.*)", str(error)):
        return f"its operator {found[1]} needs {found[2].strip()}"
    if found := re.search(r"Check failed: (.*)", str(error)):
        return f"MXNet needs {found[1].strip()}"
    lines = [line for line in str(error).splitlines() if line.strip() and not line.startswith("Stack trace")]
    return f"{type(error).__name__}: {lines[-1 if isinstance(error, SyntaxError) else 0].strip() if lines else ''}"
