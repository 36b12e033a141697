"""The order of samples, computed by arithmetic alone: which sample each position of the run reads.

A run reads *blocks* of ``block`` consecutive samples. A global batch is split over data-parallel ranks in whole blocks, and
image-text pairs are swapped within a block. Block ``k`` of the run is a function of (shards, seed, ``k``):

1. ``mixture``: block ``k`` belongs to source ``i`` and is its ``n``-th block.
2. Source ``i`` is read by ``streams`` logical streams in turn: block ``n`` is block ``n // streams`` of stream
   ``n % streams``.
3. Every epoch the shards of the source are shuffled and laid end to end; stream ``t`` of ``S`` reads the range
   ``[t N / S, (t+1) N / S)`` of the ``N`` samples, so that it has one shard open at a time.
4. Inside its part of a shard, samples are shuffled in windows of at most ``window`` samples.

Nothing here depends on ranks, workers or restarts, and every sample comes exactly once an epoch.
"""

import functools
from dataclasses import dataclass

import numpy as np

from gptface_dist.errors import UserError
from gptface_dist.hashing import stable_hash

MIXTURE_CYCLE = 1000
"""Blocks after which every source has had exactly its share."""


def keyed_generator(*names: int | str) -> np.random.Generator:
    """A generator that depends on the names alone, the same on every machine: Philox keyed by their BLAKE2 hash."""
    return np.random.Generator(np.random.Philox(key=stable_hash("\0".join(map(str, names)), 16)))


@dataclass(frozen=True)
class SampleRef:
    """Address of a sample in its source."""

    epoch: int
    """Complete passes of the stream over its samples before this one."""
    shard: int
    """Index of the shard in the source's ``index.json``, from 0."""
    sample: int
    """Index of the sample in the shard, from 0."""
    segment: int
    """Number of samples of this shard that the stream reads in this epoch."""


class SourceOrder:
    """The order of one source's samples.

    Args:
        counts: samples in each shard.
        seed: the run's seed.
        name: second key of the order, besides the seed: a hash of the shards, so that data may move.
        streams: number of logical streams.
        window: largest number of consecutive samples shuffled together.
    """

    def __init__(self, counts: list[int], seed: int, name: str, streams: int, window: int):
        total = sum(counts)
        if streams < 1 or window < 1:
            raise UserError(f"streams ({streams}) and window ({window}) must be at least 1")
        if total < streams:
            raise UserError(
                f"source {name!r} holds {total} samples, fewer than its {streams} streams: set streams to {total} or less"
            )
        self._counts = np.asarray(counts, dtype=np.int64)
        self._total = total
        self._seed, self._name, self._streams, self._window = seed, name, streams, window
        # Enough for every stream's current window, and for the two epochs that streams can be in at once.
        self._epoch = functools.lru_cache(maxsize=4)(self._shuffled_shards)
        self._permutation = functools.lru_cache(maxsize=2 * streams + 2)(self._shuffled_window)

    @property
    def streams(self) -> int:
        """Number of logical streams."""
        return self._streams

    def stream_range(self, stream: int) -> tuple[int, int]:
        """The part ``[start, stop)`` of each epoch's sequence that a stream reads."""
        return stream * self._total // self._streams, (stream + 1) * self._total // self._streams

    def place(self, stream: int, position: int) -> SampleRef:
        """The sample at a stream's position: 0, 1, 2, ... over all epochs."""
        low, high = self.stream_range(stream)
        epoch, offset = divmod(position, high - low)
        shards, starts = self._epoch(epoch)
        in_epoch = low + offset
        slot = int(np.searchsorted(starts, in_epoch, side="right")) - 1
        segment_low, segment_high = max(low, int(starts[slot])), min(high, int(starts[slot + 1]))
        window = (in_epoch - segment_low) // self._window
        window_low = segment_low + window * self._window
        size = min(self._window, segment_high - window_low)
        shuffled = self._permutation(epoch, stream, slot, window, size)
        sample = window_low + int(shuffled[in_epoch - window_low]) - int(starts[slot])
        return SampleRef(epoch, int(shards[slot]), sample, segment_high - segment_low)

    def _shuffled_shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's shards in order [shards], and their first positions in the epoch's sequence plus its end [shards + 1]."""
        shards = keyed_generator("shards", self._seed, self._name, epoch).permutation(len(self._counts))
        starts = np.concatenate([[0], np.cumsum(self._counts[shards])])
        return shards, starts

    def _shuffled_window(self, epoch: int, stream: int, slot: int, window: int, size: int) -> np.ndarray:
        return keyed_generator("window", self._seed, self._name, epoch, stream, slot, window).permutation(size)


class Mixture:
    """Assigns each block of the run to a source.

    Every :data:`MIXTURE_CYCLE` blocks hold each source exactly in proportion to its weight (rounded to the cycle, at
    least one block), in an order shuffled anew for every cycle.
    """

    def __init__(self, weights: list[float], seed: int):
        if not weights or any(not weight > 0 for weight in weights):
            raise UserError(f"source weights must be positive, got {weights}")
        self._seed = seed
        shares = np.asarray(weights, dtype=np.float64) / sum(weights) * MIXTURE_CYCLE
        quotas = np.maximum(1, np.floor(shares)).astype(np.int64)
        # Largest remainders first; when the minimum of one overshot, the largest quota pays.
        while quotas.sum() < MIXTURE_CYCLE:
            quotas[np.argmax(shares - quotas)] += 1
        while quotas.sum() > MIXTURE_CYCLE:
            quotas[np.argmax(quotas)] -= 1
        self._quotas = quotas
        self._cycle = functools.lru_cache(maxsize=2)(self._shuffled_cycle)

    def locate(self, block: int) -> tuple[int, int]:
        """Block of the run -> (source, number of the block within that source)."""
        cycle, offset = divmod(block, MIXTURE_CYCLE)
        sources, ordinals = self._cycle(cycle)
        source = int(sources[offset])
        return source, cycle * int(self._quotas[source]) + int(ordinals[offset])

    def _shuffled_cycle(self, cycle: int) -> tuple[np.ndarray, np.ndarray]:
        """For each block of a cycle: its source, and the number of earlier blocks of that source in the cycle."""
        sources = np.repeat(np.arange(len(self._quotas)), self._quotas)
        sources = keyed_generator("mixture", self._seed, cycle).permutation(sources)
        ordinals = np.empty_like(sources)
        for source, quota in enumerate(self._quotas):
            ordinals[sources == source] = np.arange(quota)
        return sources, ordinals
