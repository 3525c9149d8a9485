"""MXNet imported in a third of the time, which every rank of a run waits for.

MXNet 1.9.1 writes and compiles the source of a Python function for each of its 2,500 operators when it is imported, of
which a run uses some fifty. It also loads a library to download with, one to build packages with, and onnx. That one is
either loaded at once or never: loaded later, after Horovod, it has ended the process with a segmentation fault.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any, Optional

_MODULE, _MAKERS, _MAKE = "mxnet.base", ("_init_op_module", "_init_np_op_module"), "make_op_func"
_ONNX = "mxnet.contrib.onnx"  # imports onnx, and mxnet.onnx

Operator = Callable[..., Any]


def quicken(onnx: bool = True) -> None:
    """Have each operator's function made when it is first called. To be called before MXNet is imported.

    What is lost are the docstrings and the signatures of ``mx.nd`` and ``mx.sym``, for this process; and, unless it
    needs ``onnx``, ``mx.onnx`` with ``mx.contrib.onnx``.
    """
    if "mxnet" not in sys.modules:
        sys.meta_path.insert(0, _Finder())
        _load_when_used("requests")
        if not onnx:
            sys.modules[_ONNX] = ModuleType(_ONNX)


class _Finder(MetaPathFinder):
    """Finds the module that fills MXNet's namespaces as Python does, and changes it as soon as it has been executed.

    And finds Python's own distutils, by which MXNet compares versions, where setuptools would put its copy.
    """

    def find_spec(
        self, fullname: str, path: Optional[Sequence[str]], target: Optional[ModuleType] = None
    ) -> Optional[ModuleSpec]:
        spec = PathFinder.find_spec(fullname, path, target) if fullname in (_MODULE, "distutils") else None
        if spec and spec.loader and fullname == _MODULE:
            execute = spec.loader.exec_module

            def execute_and_change(module: ModuleType) -> None:
                execute(module)
                for name in _MAKERS:
                    _change(module, name)

            spec.loader.exec_module = execute_and_change  # type: ignore[method-assign]
        return spec


def _change(module: ModuleType, name: str) -> None:
    """Hand MXNet's loop over all operators something that makes each of them when it is used."""
    fill = getattr(module, name, None)
    if fill is None or _MAKE not in inspect.signature(fill).parameters:
        return  # another MXNet, which is not known to gain

    @wraps(fill)
    def fill_quickly(*arguments: Any, **options: Any) -> None:
        bound = inspect.signature(fill).bind(*arguments, **options)
        bound.arguments[_MAKE] = _when_used(bound.arguments[_MAKE])
        fill(*bound.args, **bound.kwargs)

    setattr(module, name, fill_quickly)


def _when_used(make: Callable[[Any, str, str], Operator]) -> Callable[[Any, str, str], Operator]:
    def promise(handle: Any, name: str, function_name: str) -> Operator:
        made: list[Operator] = []

        def operator(*arguments: Any, **options: Any) -> Any:
            if not made:
                made.append(make(handle, name, function_name))
            return made[0](*arguments, **options)

        operator.__name__ = operator.__qualname__ = function_name
        operator.__doc__ = ""  # a text, for MXNet goes on to edit it
        return operator

    return promise


def _load_when_used(name: str) -> None:
    """Put a module in the place of ``name`` that loads the true one as soon as anything of it is asked for.

    ``importlib.util.LazyLoader`` is for this, but with it the second ``import`` of a module loads it.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or name in sys.modules:
        return
    promise = importlib.util.module_from_spec(spec)

    def attribute(wanted: str) -> Any:
        if sys.modules.get(name) is promise:
            del sys.modules[name]
        return getattr(importlib.import_module(name), wanted)

    promise.__getattr__ = attribute  # type: ignore[method-assign]
    sys.modules[name] = promise
