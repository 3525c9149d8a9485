from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import mxnet as mx
import numpy as np
import pytest

from job.operators.fused import RELU, RELU_MAX_POOL, passes_for
from job.operators.kernels import CpuPasses, HostViews, host_view
from tests.oracles import assert_within

SHAPES = [(4, 3, 25), (7, 5, 1), (1, 2, 1), (1, 1, 300), (16, 8, 64)]
PASSES = CpuPasses()


def draw(shape: tuple[int, ...], offset: float = 0.5, dtype: str = "float32", seed: int = 0) -> mx.nd.NDArray:
    values = np.random.default_rng(seed).normal(offset, 1.0, shape)
    array = mx.nd.array(values, dtype=dtype)
    array.wait_to_read()
    return array


def wide(vector: np.ndarray) -> np.ndarray:
    return vector[None, :, None]


def view(array: mx.nd.NDArray) -> np.ndarray:
    """As the passes without a tail take it."""
    return PASSES.view(host_view(array), 1)


@pytest.mark.parametrize("shape", SHAPES)
def test_moments_are_those_of_numpy_in_float64(shape: tuple[int, ...]) -> None:
    x = draw(shape)
    mean, m2 = PASSES.moments(view(x))
    exact = x.asnumpy().astype(np.float64)
    assert_within(mean, exact.mean((0, 2)), 1e-6, "mean", scale=1.0)
    assert_within(m2, exact.var((0, 2)) * shape[0] * shape[2], 1e-6, "M2", scale=1.0)


@pytest.mark.parametrize("shape", [(8, 3, 50), (400, 3, 1)])
def test_moments_survive_an_offset_that_float32_squares_would_not(shape: tuple[int, ...]) -> None:
    x = draw(shape, offset=1e4)
    mean, m2 = PASSES.moments(view(x))
    exact = x.asnumpy().astype(np.float64)
    np.testing.assert_allclose(mean, exact.mean((0, 2)), rtol=1e-9)
    np.testing.assert_allclose(m2, exact.var((0, 2)) * 400, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_elementwise_and_product_passes_are_those_of_numpy(shape: tuple[int, ...]) -> None:
    x, dy = draw(shape), draw(shape, seed=1)
    center, a, b, c = np.random.default_rng(2).normal(size=(4, shape[1])).astype(np.float32)
    x_view, dy_view = view(x), view(dy)
    exact_x, exact_dy = x.asnumpy().astype(np.float64), dy.asnumpy().astype(np.float64)
    deviation = exact_x - wide(center)

    out = mx.nd.empty(shape)
    kept = PASSES.affine(x_view, center, a, b, view(out))
    assert_within(out.asnumpy(), deviation * wide(a) + wide(b), 1e-6, "affine")
    PASSES.combine(dy_view, x_view, kept, center, a, b, c, view(out))
    assert_within(out.asnumpy(), wide(a) * exact_dy + wide(b) * deviation + wide(c), 1e-6, "combine", scale=1.0)
    sums, products = PASSES.products(dy_view, x_view, kept, center)
    size = shape[0] * shape[2]
    assert_within(sums, exact_dy.sum((0, 2)), 1e-6, "sums", scale=size)
    assert_within(products, (exact_dy * deviation).sum((0, 2)), 1e-6, "products", scale=size)


@pytest.mark.parametrize("shape", SHAPES)
def test_passes_side_by_side_and_one_by_one_have_the_same_bits(shape: tuple[int, ...]) -> None:
    x, dy = draw(shape), draw(shape, seed=1)
    center, a, b, c = np.random.default_rng(2).normal(size=(4, shape[1])).astype(np.float32)
    x_view, dy_view = view(x), view(dy)

    def bits(_: int) -> list[bytes]:
        outs = [mx.nd.empty(shape) for _ in range(2)]
        kept = PASSES.affine(x_view, center, a, b, view(outs[0]))
        PASSES.combine(dy_view, x_view, kept, center, a, b, c, view(outs[1]))
        sums = PASSES.products(dy_view, x_view, kept, center)
        vectors = [*PASSES.moments(x_view), *sums, *(out.asnumpy() for out in outs)]
        return [values.tobytes() for values in vectors]

    expected = bits(0)
    with ThreadPoolExecutor(3) as pool:
        assert all(found == expected for found in pool.map(bits, range(12)))


def test_float64_stays_float64() -> None:
    x = draw((4, 3, 25), dtype="float64")
    mean, m2 = PASSES.moments(view(x))
    np.testing.assert_allclose(mean, x.asnumpy().mean((0, 2)), rtol=1e-12)
    np.testing.assert_allclose(m2, x.asnumpy().var((0, 2)) * 100, rtol=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("tail", [RELU, RELU_MAX_POOL])
@pytest.mark.parametrize("shape", [(4, 3, 6, 8), (3, 5, 7, 9), (2, 16, 2, 2), (1, 1, 5, 3), (2, 3, 4, 71)])
def test_a_tail_gives_what_mxnets_operators_give_one_after_the_other(
    shape: tuple[int, ...], tail: str, dtype: str
) -> None:
    """Ties, negative gamma and odd sizes too: the values are small integers, of which many are equal."""
    rng = np.random.default_rng(0)
    x = mx.nd.array(rng.integers(-2, 3, shape), dtype=dtype)
    center, scale, shift = rng.integers(-2, 3, (3, shape[1])).astype(dtype)
    y = mx.nd.array((x.asnumpy() - wide(center)[..., None]) * wide(scale)[..., None] + wide(shift)[..., None])
    y.attach_grad()
    with mx.autograd.record():
        z = mx.nd.relu(y)
        if tail == RELU_MAX_POOL:
            z = mx.nd.Pooling(z, kernel=(2, 2), stride=(2, 2), pool_type="max")
    head = mx.nd.array(rng.integers(1, 9, z.shape), dtype=dtype)
    z.backward(head.astype(z.dtype))
    flows = y.grad.asnumpy().astype(np.float64)  # to each value of BatchNorm's own output

    passes, out, dx = passes_for(tail), mx.nd.empty(z.shape, dtype=dtype), mx.nd.empty(shape, dtype=dtype)
    x_view, dy_view = passes.view(host_view(x), 1), passes.view(host_view(head), 1)
    kept = passes.affine(x_view, center, scale, shift, passes.view(host_view(out), 1))
    sums, products = passes.products(dy_view, x_view, kept, center)
    b, c = rng.integers(-2, 3, (2, shape[1])).astype(dtype)
    passes.combine(dy_view, x_view, kept, center, scale, b, c, passes.view(host_view(dx), 1))

    deviation = x.asnumpy().astype(np.float64) - wide(center)[..., None]
    np.testing.assert_array_equal(out.asnumpy(), z.asnumpy())
    np.testing.assert_array_equal(sums, flows.sum((0, 2, 3)))
    np.testing.assert_array_equal(products, (flows * deviation).sum((0, 2, 3)))
    expected = flows * wide(scale)[..., None] + deviation * wide(b)[..., None] + wide(c)[..., None]
    np.testing.assert_array_equal(dx.asnumpy(), expected)


@pytest.mark.parametrize("tail", [RELU, RELU_MAX_POOL])
def test_nan_stays_nan_through_a_tail(tail: str) -> None:
    x = draw((2, 3, 4, 4))
    passes, one = passes_for(tail), np.ones(3, np.float32)
    out = mx.nd.empty((2, 3, 2, 2) if tail == RELU_MAX_POOL else x.shape)  # zeros() would write beside us
    x_view, out_view = (passes.view(host_view(array), 1) for array in (x, out))
    passes.affine(x_view, np.array([0, np.nan, 0], np.float32), one, one, out_view)
    assert np.isnan(out.asnumpy()).any(axis=(0, 2, 3)).tolist() == [False, True, False]
    assert np.isnan(out.asnumpy()[:, 1]).all()


def test_a_view_that_is_remembered_follows_an_array_that_moves() -> None:
    views, there, elsewhere = HostViews(), mx.nd.zeros((2, 3)), mx.nd.ones((2, 3))
    mx.nd.waitall()
    first = views.one("x", 0, there)
    assert views("x", [there, elsewhere])[0] is first
    assert first.shape == (2, 3) and first.dtype == np.float32
    first[0, 1] = 5
    assert there.asnumpy()[0, 1] == 5
    assert views.one("x", 0, elsewhere).tolist() == [[1, 1, 1], [1, 1, 1]]
    assert views.one("y", 0, there)[0, 1] == 5
