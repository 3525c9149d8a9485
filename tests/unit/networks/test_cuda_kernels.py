"""The CUDA source, compiled without a GPU by the compiler that MXNet calls on one."""

from __future__ import annotations

import ctypes
import importlib.util
import locale
import re
from pathlib import Path

import mxnet as mx
import numpy as np
import pytest

from job.networks import queued_passes
from tests.cuda import stand_in

# The GPUs that libmxnet.so of the GPU wheel has machine code for. Each type on two of them, as each takes a second.
TARGETS = [
    ("sm_50", "float16"), ("sm_60", "float64"), ("sm_70", "float32"),
    ("sm_75", "float16"), ("sm_80", "float64"), ("sm_86", "float32"),
]  # fmt: skip


ASCII = "ANSI_X3.4-1968"


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
        with queued_passes.locale_kept():
            error = self._library.nvrtcCompileProgram(program, len(options), given)
            self.codeset = locale.nl_langinfo(locale.CODESET)
        self._library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        self._library.nvrtcGetProgramLog(program, log)
        self._library.nvrtcDestroyProgram(ctypes.byref(program))
        return error, log.value.decode()


class Asked:
    """A stand-in that keeps what MXNet would be asked to compile."""

    def __init__(self, source: str, options: list[str]) -> None:
        self.source, self.options = source, options
        Asked.last = self

    def get_kernel(self, name: str, signature: str) -> None:
        stand_in.parsed(signature)  # as strict as MXNet


@pytest.fixture(scope="module")
def compiler() -> Compiler:
    return Compiler()


@pytest.mark.parametrize(("target", "dtype"), TARGETS)
def test_the_kernels_compile_for_every_gpu_that_mxnet_supports_and_keep_all_in_registers(
    compiler: Compiler, monkeypatch: pytest.MonkeyPatch, target: str, dtype: str
) -> None:
    before = locale.nl_langinfo(locale.CODESET)
    monkeypatch.setattr(mx.rtc, "CudaModule", Asked)
    queued_passes.Kernels(dtype)
    options = [option.replace("compute_50", target) for option in Asked.last.options]
    error, log = compiler.compile(Asked.last.source, [*options, "--ptxas-options=-v"])
    assert error == 0, log
    assert (compiler.codeset, locale.nl_langinfo(locale.CODESET)) == (ASCII, before)  # what it does; what is left of it
    compiled = re.findall(r"Compiling entry function '(\w+)' for '(\w+)'", log)
    kernels = re.findall(r'extern "C" __global__ void (\w+)', Asked.last.source)
    assert sorted(compiled) == sorted((name, target) for name in kernels)
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert spills == [("0", "0")] * len(kernels)


DIVERGENT = """
extern "C" __global__ void divergent(float* y, int threads) {
  if ((int)threadIdx.x < threads) __syncthreads();
  y[threadIdx.x] = threadIdx.x;
}
"""


def test_on_the_cpu_a_barrier_that_some_threads_do_not_reach_is_found() -> None:
    module = stand_in.CudaModule(DIVERGENT, ["-DTHREADS=8"])
    kernel, y = module.get_kernel("divergent", "float* y, int threads"), mx.nd.zeros(8)
    for threads, found in ((8, 0), (5, 1), (0, 1)):
        kernel.launch([y, threads], mx.cpu(), (1, 1, 1), (8, 1, 1))
        mx.nd.waitall()
        assert len(stand_in.failures) == found
    np.testing.assert_array_equal(y.asnumpy(), np.arange(8))
    stand_in.failures.clear()


def test_an_error_in_the_source_is_found(compiler: Compiler) -> None:
    error, log = compiler.compile("__global__ void wrong() { nothing; }", [])
    assert error != 0 and 'identifier "nothing" is undefined' in log
