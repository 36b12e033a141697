"""Order: every sample once an epoch, one shard open a stream, nothing but arithmetic."""

import hashlib
import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptface_dist.data.order import MIXTURE_CYCLE, Mixture, SourceOrder, keyed_generator
from gptface_dist.errors import UserError

counts_strategy = st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(lambda counts: sum(counts) >= 5)


@settings(max_examples=100, deadline=None)
@given(counts=counts_strategy, streams=st.integers(1, 5), window=st.integers(1, 50), seed=st.integers(0, 3))
def test_every_epoch_delivers_every_sample_once(counts: list[int], streams: int, window: int, seed: int) -> None:
    order = SourceOrder(counts, seed, "s", streams, window)
    wanted = Counter((shard, sample) for shard, count in enumerate(counts) for sample in range(count))
    for epoch in range(3):
        found: Counter[tuple[int, int]] = Counter()
        for stream in range(streams):
            low, high = order.stream_range(stream)
            size = high - low
            for position in range(epoch * size, (epoch + 1) * size):
                place = order.place(stream, position)
                assert place.epoch == epoch
                found[place.shard, place.sample] += 1
        assert found == wanted


@settings(max_examples=60, deadline=None)
@given(counts=counts_strategy, streams=st.integers(1, 5), window=st.integers(1, 50))
def test_a_stream_leaves_a_shard_once_and_for_all(counts: list[int], streams: int, window: int) -> None:
    """Reading on from any position never needs a shard that the stream has left in this epoch."""
    order = SourceOrder(counts, 0, "s", streams, window)
    for stream in range(streams):
        low, high = order.stream_range(stream)
        shards = [order.place(stream, position).shard for position in range(high - low)]
        changes = [b for a, b in itertools.pairwise(shards) if a != b]
        assert len(changes) + 1 == len(set(shards))


def test_window_bounds_the_shuffle() -> None:
    order = SourceOrder([1000], 0, "s", 1, 64)
    samples = [order.place(0, position).sample for position in range(1000)]
    assert samples != sorted(samples)
    for start in range(0, 1000, 64):
        assert sorted(samples[start : start + 64]) == list(range(start, min(1000, start + 64)))


def test_segment_is_the_streams_part_of_the_shard() -> None:
    order = SourceOrder([10, 10], 0, "s", 4, 100)
    assert [order.place(0, p).segment for p in range(5)] == [5] * 5


def test_epochs_seeds_and_sources_differ_and_repeat() -> None:
    def samples(seed: int, name: str, epoch: int) -> list[int]:
        order = SourceOrder([100], seed, name, 1, 100)
        return [order.place(0, epoch * 100 + position).sample for position in range(100)]

    first = samples(0, "s", 0)
    assert first == samples(0, "s", 0)
    assert len({tuple(x) for x in (first, samples(1, "s", 0), samples(0, "t", 0), samples(0, "s", 1))}) == 4


def test_order_is_the_one_it_was_when_this_was_written() -> None:
    """Runs resume across installations: a library that draws other numbers must not pass unseen."""
    order = SourceOrder([50, 70, 30], 7, "golden", 3, 16)
    mixture = Mixture([2, 1], 7)
    places = [order.place(s, p) for s in range(3) for p in range(120)]
    blocks = [mixture.locate(k) for k in range(2500)]
    digest = hashlib.sha256(repr([(p.epoch, p.shard, p.sample) for p in places] + blocks).encode()).hexdigest()
    assert digest == "cd37e0660b9af0c8f016d6c9505e76d34e55f95297d5e2d20e36744f44e6f7f6"


@pytest.mark.parametrize("weights", [[1.0], [1, 1], [3, 1], [0.7, 0.2, 0.1], [1e-9, 1], [1, 2, 3, 4, 5, 6, 7]])
def test_mixture_numbers_each_sources_blocks_in_order(weights: list[float]) -> None:
    mixture = Mixture(weights, 0)
    seen = Counter()
    for block in range(3 * MIXTURE_CYCLE):
        source, ordinal = mixture.locate(block)
        assert ordinal == seen[source]
        seen[source] += 1
    for source, weight in enumerate(weights):
        share = seen[source] / (3 * MIXTURE_CYCLE)
        assert abs(share - weight / sum(weights)) <= 1 / MIXTURE_CYCLE + 1e-9
        assert seen[source] > 0


def test_more_streams_than_samples_is_refused_with_the_largest_number() -> None:
    with pytest.raises(UserError, match="set streams to 3 or less"):
        SourceOrder([1, 2], 0, "s", 4, 1)


def test_bad_weights_are_refused() -> None:
    for weights in ([], [0.0, 1.0], [-1.0], [float("nan")]):
        with pytest.raises(UserError, match="positive"):
            Mixture(weights, 0)


def test_random_is_keyed_by_all_names() -> None:
    draws = {keyed_generator(*names).integers(2**62) for names in (("a", "bc"), ("ab", "c"), ("a", "bc", 0), ("a", "bc", 1))}
    assert len(draws) == 4
    assert np.array_equal(keyed_generator("a", 1).random(5), keyed_generator("a", 1).random(5))
