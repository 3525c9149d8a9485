from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import mxnet as mx
import numpy as np
import pytest

from job.networks.kernels import CpuPasses, Passes, PortablePasses, passes_for
from tests.oracles import assert_within

SHAPES = [(4, 3, 25), (7, 5, 1), (1, 2, 1), (1, 1, 300), (16, 8, 64)]
BOTH = pytest.mark.parametrize("passes", [CpuPasses(), PortablePasses()], ids=["cpu", "portable"])


def draw(shape: tuple[int, ...], offset: float = 0.5, dtype: str = "float32", seed: int = 0) -> mx.nd.NDArray:
    values = np.random.default_rng(seed).normal(offset, 1.0, shape)
    array = mx.nd.array(values, dtype=dtype)
    array.wait_to_read()
    return array


def wide(vector: np.ndarray) -> np.ndarray:
    return vector[None, :, None]


@BOTH
@pytest.mark.parametrize("shape", SHAPES)
def test_moments_are_those_of_numpy_in_float64(passes: Passes, shape: tuple[int, ...]) -> None:
    x = draw(shape)
    mean, m2 = passes.moments(x)
    exact = x.asnumpy().astype(np.float64)
    assert_within(mean, exact.mean((0, 2)), 1e-6, "mean", scale=1.0)
    assert_within(m2, exact.var((0, 2)) * shape[0] * shape[2], 1e-6, "M2", scale=1.0)


@BOTH
@pytest.mark.parametrize("shape", [(8, 3, 50), (400, 3, 1)])
def test_moments_survive_an_offset_that_float32_squares_would_not(passes: Passes, shape: tuple[int, ...]) -> None:
    x = draw(shape, offset=1e4)
    mean, m2 = passes.moments(x)
    exact = x.asnumpy().astype(np.float64)
    np.testing.assert_allclose(mean, exact.mean((0, 2)), rtol=1e-9)
    np.testing.assert_allclose(m2, exact.var((0, 2)) * 400, rtol=1e-5)


@BOTH
@pytest.mark.parametrize("shape", SHAPES)
def test_elementwise_and_product_passes_are_those_of_numpy(passes: Passes, shape: tuple[int, ...]) -> None:
    x, dy = draw(shape), draw(shape, seed=1)
    center, a, b, c = np.random.default_rng(2).normal(size=(4, shape[1]))
    exact_x, exact_dy = x.asnumpy().astype(np.float64), dy.asnumpy().astype(np.float64)
    deviation = exact_x - wide(center)

    out = mx.nd.empty(shape)
    passes.affine(x, center, a, b, out)
    assert_within(out.asnumpy(), deviation * wide(a) + wide(b), 1e-6, "affine")
    passes.combine(dy, x, center, a, b, c, out)
    assert_within(out.asnumpy(), wide(a) * exact_dy + wide(b) * deviation + wide(c), 1e-6, "combine", scale=1.0)
    sums, products = passes.products(dy, x, center)
    size = shape[0] * shape[2]
    assert_within(sums, exact_dy.sum((0, 2)), 1e-6, "sums", scale=size)
    assert_within(products, (exact_dy * deviation).sum((0, 2)), 1e-6, "products", scale=size)


@BOTH
@pytest.mark.parametrize("shape", SHAPES)
def test_passes_side_by_side_and_one_by_one_have_the_same_bits(passes: Passes, shape: tuple[int, ...]) -> None:
    x, dy = draw(shape), draw(shape, seed=1)
    center, a, b, c = np.random.default_rng(2).normal(size=(4, shape[1]))

    def bits(_: int) -> list[bytes]:
        outs = [mx.nd.empty(shape) for _ in range(2)]
        passes.affine(x, center, a, b, outs[0])
        passes.combine(dy, x, center, a, b, c, outs[1])
        vectors = [*passes.moments(x), *passes.products(dy, x, center), *(out.asnumpy() for out in outs)]
        return [values.tobytes() for values in vectors]

    expected = bits(0)
    with ThreadPoolExecutor(3) as pool:
        assert all(found == expected for found in pool.map(bits, range(12)))


def test_float64_stays_float64() -> None:
    x = draw((4, 3, 25), dtype="float64")
    for passes in (CpuPasses(), PortablePasses()):
        mean, m2 = passes.moments(x)
        np.testing.assert_allclose(mean, x.asnumpy().mean((0, 2)), rtol=1e-12)
        np.testing.assert_allclose(m2, x.asnumpy().var((0, 2)) * 100, rtol=1e-12)


def test_float16_is_computed_in_float32_by_the_portable_passes() -> None:
    x = draw((64, 3, 100), offset=3.0, dtype="float16")
    passes = passes_for(x)
    assert isinstance(passes, PortablePasses)
    np.testing.assert_allclose(passes.moments(x)[0], x.asnumpy().astype(np.float64).mean((0, 2)), rtol=1e-6)


def test_the_cpu_takes_the_compiled_passes_for_float32() -> None:
    assert isinstance(passes_for(draw((2, 2, 2))), CpuPasses)
