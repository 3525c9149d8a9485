"""What reaches the network, on each way to the device, with the CPU as the device; and who waits for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Optional

import mxnet as mx
import numpy as np
import pytest
from mxnet.base import _LIB
from mxnet.gluon import nn

from job.data.dataset import FASHION_MNIST, Description, Part, Split
from job.data.sampler import Sampler
from job.training import feed as feed_module
from job.training.feed import Feed, Staging
from tests.cuda.queued import WAITS
from tests.unit.training.test_learner import CPU, learner, parameters, split

COLOUR = Description(("a", "b"), (3, 6, 4), (0.5, 0.25, 0.125), (0.5, 1.0, 2.0))
WAYS: dict[str, Optional[int]] = {"mapped": None, "kept": 1 << 30, "copied": 0}
SAMPLES: list[Any] = [np.array([4, 0, 0, 17]), slice(3, 11), np.array([19])]


def colour() -> Split:
    random = np.random.default_rng(0)
    return Split(random.integers(0, 256, (20, 3, 6, 4), dtype=np.uint8), random.integers(0, 2, 20))


def held_out(data: Split) -> Split:
    places = np.array([7, 3, *range(8, 20), 0, 1, 2, 4, 5, 6])
    return Split(Part(data.images, places), data.labels[places])


@contextmanager
def waits() -> Iterator[list[str]]:
    """What is called of MXNet that waits for its engine, or copies from and to the host."""
    called: list[str] = []
    real = {name: getattr(_LIB, f"MXNDArray{name}", None) for name in WAITS}

    def counting(name: str) -> Any:
        def call(*arguments: Any) -> Any:
            called.append(name)
            return real[name](*arguments)  # type: ignore[misc]

        return call

    for name in [name for name in WAITS if real[name]]:
        setattr(_LIB, f"MXNDArray{name}", counting(name))
    try:
        yield called
    finally:
        for name, function in real.items():
            if function:
                setattr(_LIB, f"MXNDArray{name}", function)


def fed(about: Description, data: Split, samples: Any, way: str, dtype: str) -> list[bytes]:
    feed = Feed(CPU, dtype, about, WAYS[way])
    feed(data, SAMPLES[0])  # the second batch finds what the first one has brought
    images, labels = feed(data, samples)
    assert images.dtype == labels.dtype == np.dtype(dtype) and images.shape[1:] == about.shape
    return [images.asnumpy().tobytes(), labels.asnumpy().tobytes()]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("samples", SAMPLES, ids=["indices", "slice", "one"])
@pytest.mark.parametrize("about", [FASHION_MNIST, COLOUR], ids=["grey", "colour"])
def test_a_batch_has_the_same_bits_on_every_way(about: Description, samples: Any, dtype: str) -> None:
    data = split(20) if about is FASHION_MNIST else colour()
    for of in (data, held_out(data)):
        mapped = fed(about, of, samples, "mapped", dtype)
        assert fed(about, of, samples, "kept", dtype) == mapped
        assert fed(about, of, samples, "copied", dtype) == mapped


def test_a_data_set_stays_on_the_device_as_long_as_there_is_room() -> None:
    first, second, third = split(20), split(20), split(10)
    feed = Feed(CPU, "float32", kept_bytes=first.images.nbytes + third.images.nbytes)
    for _ in range(2):
        kept = [feed._of_device(data) is not None for data in (first, second, third)]
        assert kept == [True, False, True]
    assert feed._of_device(Split(Part(third.images, np.arange(1)), third.labels[:1])) is None


def test_pictures_that_are_decoded_are_copied_batch_by_batch() -> None:
    data = split(20)

    class Decoded:
        def __getitem__(self, samples: Any) -> Any:
            return data.images[samples]

    for images in (Decoded(), Part(Decoded(), np.arange(20))):
        feed = Feed(CPU, "float32", kept_bytes=1 << 30)
        assert feed._of_device(Split(images, data.labels)) is None
        found, _ = feed(Split(images, data.labels), np.array([3]))
        assert found.asnumpy().tobytes() == Feed(CPU, "float32")(data, np.array([3]))[0].asnumpy().tobytes()


def test_images_that_are_changed_are_changed_on_the_host() -> None:
    data, feed = split(20), Feed(CPU, "float32", kept_bytes=1 << 30)
    plain, _ = feed(data, np.array([3, 4]))
    changed, _ = feed(data, np.array([3, 4]), lambda pixels: 255 - pixels)
    np.testing.assert_allclose(changed.asnumpy(), 1 - plain.asnumpy(), atol=1e-6)


def test_a_quarter_of_what_a_gpu_has_free_is_for_data_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(mx.context, "gpu_memory_info", lambda device: asked.append(device) or (4000, 9000))
    monkeypatch.setattr(mx.nd, "array", lambda values, ctx, dtype: np.asarray(values))
    feed = Feed(mx.gpu(3), "float32")
    assert asked == [3] and feed._kept_bytes == 1000
    assert feed._staging is not None and feed._staging._host == mx.cpu_pinned(3)


def test_a_batch_of_what_is_kept_copies_its_indices_and_waits_for_nothing() -> None:
    data, feed = split(20), Feed(CPU, "float32", kept_bytes=1 << 30)
    feed(data, SAMPLES[0])
    with waits() as called:
        feed(data, SAMPLES[0])
        feed(data, slice(0, 5))
    assert called == ["SyncCopyFromCPU"]  # from the host to the host


def test_a_buffer_is_not_filled_again_before_its_copy_is_made() -> None:
    staging = Staging(CPU)
    arrays = [np.full((64, 4096), k, np.uint8) for k in range(40)]
    copies = [staging(array) for array in arrays]
    (ring,) = staging._rings.values()
    assert len(ring) == feed_module._BUFFERS
    for k, copy in enumerate(copies):
        assert (copy.asnumpy() == k).all()


def test_shapes_and_types_have_buffers_of_their_own() -> None:
    staging = Staging(CPU)
    for values in (np.zeros((2, 3), np.uint8), np.ones((3, 2), np.uint8), np.ones((2, 3), np.float32)):
        copy = staging(values)
        assert copy.shape == values.shape and copy.dtype == values.dtype and (copy.asnumpy() == values).all()
    assert len(staging._rings) == 3


def trained(kept: Optional[int], ahead: bool, augment: bool = False) -> list[bytes]:
    """The weights after five steps of two micro-batches, of a network with Dropout."""
    net = nn.HybridSequential()
    net.add(nn.Dense(12), nn.BatchNorm(), nn.Dropout(0.5), nn.Dense(10))
    data, sampler = split(60), Sampler(60, 24, 3)
    options: dict[str, Any] = {"augment": {"horizontal_flip": True, "crop_padding": 2}} if augment else {}
    own = learner(net, "float32", train={"accumulate_steps": 2}, learning_rate=0.25, **options)
    own.feed = Feed(CPU, "float32", kept_bytes=kept)
    own._bring = own.feed.bring
    steps = sampler.batches(range(5), range(3), 3, 2)
    for step, batch in own.ahead(steps) if ahead else steps:
        own.step(data, batch, len(sampler.batch(step % sampler.steps_per_epoch)), 0.25)
    return [values.tobytes() for values in parameters(own)]


@pytest.mark.parametrize("augment", [False, True], ids=["plain", "augmented"])
def test_the_same_is_learned_on_every_way_and_ahead_or_not(augment: bool) -> None:
    expected = trained(None, ahead=False, augment=augment)
    for way, kept in WAYS.items():
        assert trained(kept, ahead=True, augment=augment) == expected, way


def events(micros: int, steps: int) -> Sequence[str]:
    """Which input is made, and which gradients are waited for, in this order."""
    found: list[str] = []
    own = learner(dtype="float32", train={"accumulate_steps": micros})
    sampler, data, make, add = Sampler(60, 12, 3), split(60), own._fed, own._sums.add

    def fed(split: Split, shards: Any, step: int) -> Any:
        found.append(f"input {step}")
        return make(split, shards, step)

    def added(*arguments: Any, **options: Any) -> None:
        found.append(f"wait {own.steps}")
        add(*arguments, **options)

    own._fed, own._sums.add = fed, added  # type: ignore[method-assign]
    for _, batch in own.ahead(sampler.batches(range(steps), range(3), 3, micros)):
        own.step(data, batch, 12, 0.1)
    return found


def test_the_input_of_the_next_batch_is_made_while_one_is_computed() -> None:
    assert events(1, 3) == ["input 0", "input 1", "wait 0", "input 2", "wait 1", "wait 2"]
    assert events(2, 2) == ["input 0", "input 0", "wait 0", "input 1", "wait 0", "input 1", "wait 1", "wait 1"]


def test_another_batch_than_was_expected_is_made_anew() -> None:
    found = []
    for expected in (False, True):
        own, sampler = learner(dtype="float32"), Sampler(60, 12, 3)
        first, second, third = (sampler.shards(0, step, range(3), 3) for step in range(3))
        own._upcoming = [second] if expected else []
        own.step(split(60), [first], 12, 0.1)
        assert (own._ahead is not None) == expected
        own.step(split(60), [third], 12, 0.1)
        found.append([values.tobytes() for values in parameters(own)])
    assert found[0] == found[1]


def test_what_was_made_ahead_of_a_run_that_goes_on_elsewhere_is_not_used() -> None:
    own, sampler = learner(dtype="float32"), Sampler(60, 12, 3)
    (_, first), *_ = own.ahead(sampler.batches(range(2), range(3), 3))
    own._upcoming = [first[0]]  # the same samples, as those of the next step
    own.step(split(60), first, 12, 0.1)
    assert own._ahead is not None
    own.load_state_dict({"steps": 7, "skipped": 0})
    assert own._ahead is None


def test_an_evaluation_of_what_is_kept_waits_for_its_results_alone() -> None:
    own, data = learner(dtype="float32"), split(50)
    own.feed = Feed(CPU, "float32", kept_bytes=1 << 30)
    own.evaluate(data, 20)
    with waits() as called:
        found = own.evaluate(data, 20)
    assert called == ["SyncCopyToCPU"] * 3  # chunks, at the end
    assert found.count == 50
