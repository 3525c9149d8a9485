"""The sampler against numpy's own way to cut an array, and against a Philox generator written out here."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from job.data.sampler import Sampler, Span, hold_out, own_shards, permutation
from job.errors import UsageError

RANKS = st.integers(1, 17)
MICROS = st.integers(1, 5)
SAMPLES = st.integers(1, 400)
BATCHES = st.integers(1, 450)
SEEDS = st.integers(0, 2**31 - 1)
EPOCHS = st.integers(0, 1000)
SHARDS = st.integers(1, 40)


def global_batch(sampler: Sampler, epoch: int, step: int, size: int, micros: int, shards: int = 17) -> np.ndarray:
    """The samples that all ranks together see, in the order of micro-batches and ranks."""
    seen = [
        shard.samples
        for micro in range(micros)
        for rank in range(size)
        for shard in sampler.shards(epoch, step, own_shards(rank, size, shards), shards, micro, micros)
    ]
    return np.concatenate(seen)


def philox(seed: int, epoch: int, count: int) -> list[int]:
    """Philox4x64-10 from the paper (Salmon et al., 2011, section 4.3), as numpy runs it: the counter starts at 1."""
    mask = 2**64 - 1
    numbers: list[int] = []
    for block in range(-(-count // 4)):
        x, key = [block + 1, 0, 0, 0], [seed, epoch]
        for _ in range(10):
            low, high = x[0] * 0xD2E7470EE14C6C93, x[2] * 0xCA5A826395121157
            x = [(high >> 64) ^ x[1] ^ key[0], high & mask, (low >> 64) ^ x[3] ^ key[1], low & mask]
            key = [(key[0] + 0x9E3779B97F4A7C15) & mask, (key[1] + 0xBB67AE8584CAA73B) & mask]
        numbers += x
    return numbers[:count]


@settings(deadline=None)
@given(samples=SAMPLES, batch=BATCHES, size=RANKS, micros=MICROS, shards=SHARDS, epoch=EPOCHS, seed=SEEDS)
def test_every_sample_is_seen_exactly_once_in_an_epoch(
    samples: int, batch: int, size: int, micros: int, shards: int, epoch: int, seed: int
) -> None:
    sampler = Sampler(samples, batch, seed)
    seen = [global_batch(sampler, epoch, step, size, micros, shards) for step in range(sampler.steps_per_epoch)]
    np.testing.assert_array_equal(np.sort(np.concatenate(seen)), np.arange(samples))


@settings(deadline=None)
@given(samples=SAMPLES, batch=BATCHES, shards=SHARDS, micros=MICROS, epoch=EPOCHS, seed=SEEDS)
def test_shards_are_those_of_numpys_array_split_at_every_level(
    samples: int, batch: int, shards: int, micros: int, epoch: int, seed: int
) -> None:
    sampler = Sampler(samples, batch, seed)
    batches = np.array_split(permutation(samples, seed, epoch), -(-samples // batch))
    assert sampler.steps_per_epoch == len(batches)
    for step, expected in enumerate(batches):
        for micro, part in enumerate(np.array_split(expected, micros)):
            cut = sampler.shards(epoch, step, range(shards), shards, micro, micros)
            assert len(cut) == shards
            for shard, samples_of_it in zip(cut, np.array_split(part, shards)):
                np.testing.assert_array_equal(shard.samples, samples_of_it)
                assert shard.samples.dtype == np.int64


@settings(deadline=None)
@given(samples=SAMPLES, batch=BATCHES, shards=SHARDS, micros=MICROS, seed=SEEDS, data=st.data())
def test_a_shard_knows_its_place_in_the_global_batch(
    samples: int, batch: int, shards: int, micros: int, seed: int, data: st.DataObject
) -> None:
    sampler = Sampler(samples, batch, seed)
    step = data.draw(st.integers(0, sampler.steps_per_epoch - 1))
    whole = global_batch(sampler, 0, step, 1, 1)
    for micro in range(micros):
        for shard in sampler.shards(0, step, range(shards), shards, micro, micros):
            np.testing.assert_array_equal(whole[shard.first : shard.first + len(shard.samples)], shard.samples)


@given(size=RANKS, shards=SHARDS)
def test_every_shard_has_exactly_one_rank_and_ranks_differ_by_at_most_one_shard(size: int, shards: int) -> None:
    owned = [own_shards(rank, size, shards) for rank in range(size)]
    assert [number for own in owned for number in own] == list(range(shards))  # in the order of ranks: contiguous
    assert max(map(len, owned)) - min(map(len, owned)) <= 1
    if shards >= size:
        assert all(owned)


@settings(deadline=None)
@given(samples=SAMPLES, batch=BATCHES, size=RANKS, shards=SHARDS, micros=MICROS, seed=SEEDS, data=st.data())
def test_a_shard_holds_the_same_samples_whoever_computes_it(
    samples: int, batch: int, size: int, shards: int, micros: int, seed: int, data: st.DataObject
) -> None:
    lone, one_of_many = Sampler(samples, batch, seed), Sampler(samples, batch, seed)
    step = data.draw(st.integers(0, lone.steps_per_epoch - 1))
    for micro in range(micros):
        expected = lone.shards(2, step, range(shards), shards, micro, micros)
        for rank in range(size):
            own = own_shards(rank, size, shards)
            cut = one_of_many.shards(2, step, own, shards, micro, micros)
            assert [shard.first for shard in cut] == [expected[number].first for number in own]
            for shard, number in zip(cut, own):
                np.testing.assert_array_equal(shard.samples, expected[number].samples)


@settings(deadline=None)
@given(samples=SAMPLES, batch=BATCHES, shards=SHARDS, micros=MICROS)
def test_sizes_differ_by_at_most_one_at_every_level(samples: int, batch: int, shards: int, micros: int) -> None:
    sampler = Sampler(samples, batch, seed=0)
    batches = [sampler.batch(step) for step in range(sampler.steps_per_epoch)]
    lengths = [len(span) for span in batches]
    assert max(lengths) <= batch
    assert max(lengths) - min(lengths) <= 1
    assert min(lengths) == sampler.smallest_batch
    for step, span in enumerate(batches):
        parts = [span.part(micro, micros) for micro in range(micros)]
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
        for micro in range(micros):
            sizes = [len(shard.samples) for shard in sampler.shards(0, step, range(shards), shards, micro, micros)]
            assert max(sizes) - min(sizes) <= 1


@settings(deadline=None)
@given(samples=SAMPLES, batch=BATCHES, first=RANKS, second=RANKS, micros=MICROS, seed=SEEDS, data=st.data())
def test_a_step_trains_on_the_same_samples_for_any_number_of_ranks(
    samples: int, batch: int, first: int, second: int, micros: int, seed: int, data: st.DataObject
) -> None:
    one, other = Sampler(samples, batch, seed), Sampler(samples, batch, seed)
    step = data.draw(st.integers(0, one.steps_per_epoch - 1))
    expected = global_batch(one, 3, step, first, 1)
    np.testing.assert_array_equal(global_batch(other, 3, step, second, micros), expected)  # in the same order


@settings(deadline=None)
@given(samples=SAMPLES, batch=BATCHES, before=RANKS, after=RANKS, seed=SEEDS, data=st.data())
def test_a_run_resumed_at_any_step_with_any_ranks_misses_and_repeats_nothing(
    samples: int, batch: int, before: int, after: int, seed: int, data: st.DataObject
) -> None:
    started, resumed = Sampler(samples, batch, seed), Sampler(samples, batch, seed)
    steps = 2 * started.steps_per_epoch
    change = data.draw(st.integers(0, steps))
    seen = np.zeros((2, samples), int)
    for step in range(steps):
        epoch, index = divmod(step, started.steps_per_epoch)
        sampler, size = (started, before) if step < change else (resumed, after)
        seen[epoch, global_batch(sampler, epoch, index, size, 1)] += 1
    np.testing.assert_array_equal(seen, 1)


@settings(deadline=None)
@given(seed=SEEDS, other_seed=SEEDS, epoch=EPOCHS, other_epoch=EPOCHS)
def test_permutations_are_equal_for_the_same_seed_and_epoch_and_for_no_others(
    seed: int, other_seed: int, epoch: int, other_epoch: int
) -> None:
    same = (seed, epoch) == (other_seed, other_epoch)
    assert np.array_equal(permutation(100, seed, epoch), permutation(100, other_seed, other_epoch)) == same


def test_the_next_epoch_and_the_next_seed_have_another_order() -> None:
    orders = {tuple(permutation(100, seed, epoch)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_a_sampler_goes_back_to_an_earlier_epoch() -> None:
    sampler = Sampler(100, 100, seed=0)
    first = global_batch(sampler, 0, 0, 1, 1)
    second = global_batch(sampler, 1, 0, 1, 1)
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(global_batch(sampler, 0, 0, 1, 1), first)


def test_the_tutorials_epoch_has_235_batches_of_256_or_255() -> None:
    sampler = Sampler(60_000, 256, seed=0)
    lengths = [len(sampler.batch(step)) for step in range(sampler.steps_per_epoch)]
    assert len(lengths) == 235
    assert (lengths.count(256), lengths.count(255)) == (75, 160)  # 75 * 256 + 160 * 255 = 60,000
    assert sampler.smallest_batch == 255


def test_a_span_is_cut_by_hand() -> None:
    assert [Span(10, 17).part(index, 3) for index in range(3)] == [(10, 13), (13, 15), (15, 17)]
    assert len(Span(10, 17)) == 7
    assert [len(Span(5, 7).part(index, 4)) for index in range(4)] == [1, 1, 0, 0]


@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (0, 1), (7, 0), (2**31 - 1, 12)])
def test_the_permutation_sorts_the_philox_stream(seed: int, epoch: int) -> None:
    keys = philox(seed, epoch, 1001)
    assert permutation(1001, seed, epoch).tolist() == sorted(range(1001), key=keys.__getitem__)


# A release that changes these numbers changes what every run learns, and breaks the resumption of all runs.
@pytest.mark.parametrize(
    ("seed", "epoch", "first"),
    [
        (0, 0, [47848, 34552, 24994, 32827, 31943, 24289, 10614, 55265]),
        (0, 1, [12569, 57285, 42502, 35289, 26576, 22685, 6123, 31556]),
        (42, 3, [18592, 4682, 20826, 15416, 21195, 53036, 22405, 30946]),
    ],
)
def test_the_order_of_fashion_mnist_is_pinned(seed: int, epoch: int, first: list[int]) -> None:
    keys = philox(seed, epoch, 60_000)
    assert sorted(range(60_000), key=keys.__getitem__)[:8] == first
    order = permutation(60_000, seed, epoch)
    assert order[:8].tolist() == first
    assert (order.dtype, order.shape) == (np.int64, (60_000,))


LABELS = np.random.default_rng(2).choice(5, 1000, p=[0.5, 0.3, 0.1, 0.099, 0.001]).astype(np.uint8)


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.99])
def test_of_each_class_that_part_is_held_out_and_nothing_is_lost(fraction: float) -> None:
    kept, held = hold_out(LABELS, fraction, 0)
    np.testing.assert_array_equal(np.sort(np.concatenate([kept, held])), np.arange(len(LABELS)))
    for label in range(5):
        count = int((label == LABELS).sum())
        assert (LABELS[held] == label).sum() == math.floor(fraction * count)
    assert (np.diff(held) > 0).all() and (np.diff(kept) > 0).all()
    places = held[LABELS[held] == 0] / len(LABELS)
    assert 0.35 < places.mean() < 0.65  # from all over the set


def test_what_is_held_out_follows_from_its_own_seed_and_the_labels_alone() -> None:
    np.testing.assert_array_equal(hold_out(LABELS, 0.2, 0)[1], hold_out(LABELS.astype(np.int64), 0.2, 0)[1])
    assert not np.array_equal(hold_out(LABELS, 0.2, 0)[1], hold_out(LABELS, 0.2, 1)[1])
    assert set(hold_out(LABELS, 0.1, 0)[1]) < set(hold_out(LABELS, 0.2, 0)[1])


def test_nothing_is_held_out_unless_it_is_asked_for() -> None:
    kept, held = hold_out(LABELS, 0.0, 0)
    assert len(kept) == len(LABELS) and not len(held)


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_an_epoch_has_each_sample_that_is_kept_once_and_no_other(shards: int) -> None:
    kept, _ = hold_out(LABELS, 0.3, 0)
    sampler = Sampler(len(kept), 64, 5, kept)
    cut = [sampler.shards(3, step, range(shards), shards) for step in range(sampler.steps_per_epoch)]
    seen = np.concatenate([shard.samples for of_step in cut for shard in of_step])
    np.testing.assert_array_equal(np.sort(seen), kept)
    np.testing.assert_array_equal(seen, kept[permutation(len(kept), 5, 3)])
    assert {shard.epoch for of_step in cut for shard in of_step} == {3}


def test_a_part_that_is_not_one_sample_is_refused() -> None:
    with pytest.raises(UsageError, match=r"data\.validation_fraction=0\.001: is not one sample of any class"):
        hold_out(LABELS, 0.001, 0)


def test_the_batches_of_a_run_go_on_over_epochs_from_any_step() -> None:
    sampler = Sampler(10, 4, seed=1)
    found = list(sampler.batches(range(2, 7), range(1, 3), 3, micros=2))
    assert [step for step, _ in found] == [2, 3, 4, 5, 6]
    for step, batch in found:
        for micro, shards in enumerate(batch):
            expected = Sampler(10, 4, seed=1).shards(step // 3, step % 3, range(1, 3), 3, micro, 2)
            assert [shard.samples.tolist() for shard in shards] == [shard.samples.tolist() for shard in expected]
