"""The CUDA source, compiled without a GPU by the compiler that MXNet calls on one."""

from __future__ import annotations

import itertools
import locale
import re

import mxnet as mx
import numpy as np
import pytest

from tests.cuda import nvrtc, stand_in
from tests.cuda.nvrtc import Compiler

# Each type on two GPUs, as each takes a second. In the image it is each type on each of them.
TARGETS = list(zip(nvrtc.TARGETS, itertools.cycle(("float16", "float64", "float32"))))
ASCII = "ANSI_X3.4-1968"


@pytest.fixture(scope="module")
def compiler() -> Compiler:
    return Compiler()


@pytest.mark.parametrize(("target", "dtype"), TARGETS)
def test_the_kernels_compile_for_every_gpu_that_mxnet_supports_and_keep_all_in_registers(
    compiler: Compiler, target: str, dtype: str
) -> None:
    before = locale.nl_langinfo(locale.CODESET)
    source, options = nvrtc.request(dtype)
    spilled = compiler.spilled_bytes(source, options, target)
    assert (compiler.codeset, locale.nl_langinfo(locale.CODESET)) == (ASCII, before)  # what it does; what is left of it
    assert spilled == dict.fromkeys(re.findall(r'extern "C" __global__ void (\w+)', source), 0)


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
