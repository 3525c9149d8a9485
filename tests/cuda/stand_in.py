"""A stand-in for ``mx.rtc``: the same CUDA source, built by g++ with shim.h, run on arrays of the CPU.

Kernels are queued to MXNet's own engine as MXNet queues them: what the signature calls const is read, all else written.
So an array that is read too early shows, and a kernel that reads and writes one array hangs, as it would on a GPU.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Callable

import mxnet as mx
import numpy as np
from mxnet.base import _LIB, check_call
from mxnet.rtc import _DTYPE_CPP_TO_NP

SHIM = Path(__file__).with_name("shim.h")
failures: list[str] = []  # of kernels that ran
_calls: list[Any] = []  # which the engine may still make: kept as long as the process lives


class CudaModule:
    """``mx.rtc.CudaModule`` as far as it is used here."""

    def __init__(self, source: str, options: Sequence[str] = ()) -> None:
        self.signatures = dict(re.findall(r'extern "C" __global__ void (\w+)\(([^)]*)\)', source))
        self._library = ctypes.CDLL(str(_built(source, options, self.signatures)))

    def get_kernel(self, name: str, signature: str) -> _Kernel:
        return _Kernel(getattr(self._library, f"launch_{name}"), name, signature)


def _built(source: str, options: Sequence[str], names: Sequence[str]) -> Path:
    """The library of that source, built once for all processes of this user."""
    defines = [option for option in options if option.startswith("-D")]
    launches = [
        f'extern "C" int launch_{name}(void** arguments, unsigned x, unsigned y)'
        f" {{ return shim::launch({name}, arguments, x, y); }}"
        for name in names
    ]
    program = "\n".join([f'#include "{SHIM}"', source, *launches])
    key = hashlib.sha256("\n".join([SHIM.read_text(), program, *defines]).encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"cuda-stand-in-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    library = folder / f"{key}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            (Path(scratch) / "program.cpp").write_text(program)
            out = Path(scratch) / "library.so"
            build = ["g++", "-std=c++17", "-O2", "-shared", "-fPIC", *defines, "program.cpp", "-o", str(out)]
            done = subprocess.run(build, cwd=scratch, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            out.rename(library)
    return library


class _Kernel:
    def __init__(self, function: Callable[..., int], name: str, signature: str) -> None:
        self._function, self._name = function, name
        self._parameters = parsed(signature)

    def launch(self, args: Sequence[Any], ctx: mx.Context, grid_dims: Any, block_dims: Any) -> None:
        assert len(args) == len(self._parameters), self._name
        assert len(grid_dims) == len(block_dims) == 3 and grid_dims[2] == block_dims[1] == block_dims[2] == 1
        reads, writes = [], []
        for place, (argument, (const, dtype, is_array)) in enumerate(zip(args, self._parameters)):
            if is_array:
                assert isinstance(argument, mx.nd.NDArray), (self._name, place)
                assert (argument.dtype, argument.context) == (dtype, ctx), (self._name, place)
                (reads if const else writes).append(argument)

        def run(*_: Any) -> None:
            values = [
                ctypes.c_void_p(_pointer(argument)) if is_array else np.ctypeslib.as_ctypes_type(dtype)(argument)
                for argument, (_, dtype, is_array) in zip(args, self._parameters)
            ]
            addresses = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
            if self._function(addresses, *grid_dims[:2]):
                failures.append(f"{self._name}: a barrier that not all threads reach")

        _push(run, ctx, reads, writes)


def parsed(signature: str) -> list[tuple[bool, np.dtype, bool]]:
    """As MXNet reads it: of each parameter whether it is const, its type, and whether it is an array."""
    pattern = re.compile(r"^(const )?(\w+) ?(\*)? ?(\w+)?$")
    found = [pattern.match(" ".join(argument.split())) for argument in signature.split(",")]
    assert all(found), signature
    return [(bool(m[1]), np.dtype(_DTYPE_CPP_TO_NP[m[2]]), bool(m[3])) for m in found if m]


def _pointer(array: mx.nd.NDArray) -> int:
    pointer = ctypes.c_void_p()
    check_call(_LIB.MXNDArrayGetData(array.handle, ctypes.byref(pointer)))
    return pointer.value or 0


class _Context(ctypes.Structure):
    _fields_ = (("dev_type", ctypes.c_int32), ("dev_id", ctypes.c_int32))


def _push(run: Callable[..., None], ctx: mx.Context, reads: list[mx.nd.NDArray], writes: list[mx.nd.NDArray]) -> None:
    call = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)(run)
    _calls.append(call)
    handles = [(ctypes.c_void_p * len(arrays))(*(array.handle.value for array in arrays)) for arrays in (reads, writes)]
    context = _Context(ctx.device_typeid, ctx.device_id)
    arguments = (ctypes.byref(context), handles[0], len(reads), handles[1], len(writes), None, 0, b"stand-in")
    check_call(_LIB.MXEnginePushSyncND(call, None, None, *arguments))
