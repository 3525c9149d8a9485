"""NVRTC, the compiler that MXNet calls on a GPU, called without one.

As a script it needs MXNet's build for GPUs and ``job``: MXNet compiles the kernels, then the library that it called for
it compiles them for every GPU. It prints what came of that as JSON.
"""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
import json
import locale
import re
from pathlib import Path
from typing import Any, Callable
from unittest import mock

import mxnet as mx

from job.operators import cuda_kernels

# The GPUs that libmxnet.so of the GPU wheel has machine code for, and one that the code for sm_70 runs on.
TARGETS = ("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86")
DTYPES = ("float16", "float32", "float64")


class Compiler:
    """NVRTC, through its C interface."""

    def __init__(self) -> None:
        spec = importlib.util.find_spec("nvidia.cuda_nvrtc")
        assert spec and spec.submodule_search_locations, "nvidia-cuda-nvrtc-cu11 is not installed: make setup"
        folder = Path(spec.submodule_search_locations[0]) / "lib"
        for name in ("libnvrtc-builtins.so.11.8", "libnvrtc.so.11.2"):  # the second looks for the first
            self._library = ctypes.CDLL(str(folder / name), ctypes.RTLD_GLOBAL)

    def compile(self, source: str, options: list[str]) -> tuple[int, str]:
        """The error, 0 if there is none, and what the compiler says."""
        program, size = ctypes.c_void_p(), ctypes.c_size_t()
        self._library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None)
        given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        with cuda_kernels.locale_kept():
            error = self._library.nvrtcCompileProgram(program, len(options), given)
            self.codeset = locale.nl_langinfo(locale.CODESET)
        self._library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        self._library.nvrtcGetProgramLog(program, log)
        self._library.nvrtcDestroyProgram(ctypes.byref(program))
        return error, log.value.decode()

    def spilled_bytes(self, source: str, options: list[str], target: str) -> dict[str, int]:
        """What each kernel keeps in memory for want of registers, on the GPUs of that architecture.

        Raises:
            AssertionError: it does not compile.
        """
        options = [option.replace("compute_50", target) for option in options]
        error, log = self.compile(source, [*options, "--ptxas-options=-v"])
        assert error == 0, log
        kernels = re.findall(rf"Compiling entry function '(\w+)' for '{target}'", log)
        spilled = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
        assert len(kernels) == len(spilled), log
        return {kernel: int(stores) + int(loads) for kernel, (stores, loads) in zip(kernels, spilled)}


def request(dtype: str, module: Callable[..., Any] | None = None) -> tuple[str, list[str]]:
    """The source and the options that MXNet is given for the kernels of a type. ``module`` compiles it, if anything."""
    with mock.patch.object(mx.rtc, "CudaModule", wraps=module) as asked:
        cuda_kernels.Kernels(dtype)
    source, options = asked.call_args.args
    return source, options


def main() -> None:
    requests = {dtype: request(dtype, mx.rtc.CudaModule) for dtype in DTYPES}  # before the other one finds it a library
    compiler = Compiler()
    spilled = {
        f"{target} {dtype}": compiler.spilled_bytes(*requests[dtype], target)
        for target, dtype in itertools.product(TARGETS, DTYPES)
    }
    libraries = set(re.findall(r"\S+/libnvrtc\.so\S*", Path("/proc/self/maps").read_text()))
    print(json.dumps({"libraries": sorted(libraries), "spilled_bytes": spilled}))


if __name__ == "__main__":
    main()
