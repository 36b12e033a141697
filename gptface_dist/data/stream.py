"""Read blocks of samples in the run's order, by offset; check them, and replace unreadable ones.

A sample that is unreadable or on the skip list is replaced by the next one of its stream *in its place*. The order of all
other samples does not change, so a run may add keys to its skip list and resume, and its position stays one number.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from gptface_dist.data.folder import ShardFile, ShardFolder, Unreadable
from gptface_dist.data.order import Mixture, SampleRef, SourceOrder
from gptface_dist.data.shards import Extent, Sidecar
from gptface_dist.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Provenance:
    """Origin of a sample: source, shard, key and epoch."""

    source: str
    """Location of the source."""
    shard: str
    """Name of the shard."""
    key: str
    """The sample's key; empty when the shard itself could not be read."""
    epoch: int
    """Complete passes of the stream over its samples before this one."""

    def __str__(self) -> str:
        return f"{self.source}/{self.shard} key {self.key or '?'}"


@dataclass(frozen=True)
class Substitution:
    """A sample that was not delivered, and the sample delivered in its place."""

    origin: Provenance
    """The sample that the order names."""
    reason: str
    """Why it was not delivered, in words."""
    by: Provenance
    """The sample delivered instead."""
    skipped: bool
    """Whether it is on the skip list: intended, and not counted as bad."""


@dataclass(frozen=True)
class RawSample:
    """One sample's members; each is read from the shard by :meth:`read`."""

    origin: Provenance
    """Source, shard, key and epoch of the sample."""
    shard: ShardFile
    """The open shard that holds the sample."""
    extents: dict[str, Extent]
    """Extension -> extent of the member in the shard."""

    def read(self, extension: str) -> bytes:
        """A member's bytes; :class:`Unreadable` when it is missing or damaged."""
        if extension not in self.extents:
            raise Unreadable(f"no .{extension} member")
        return self.shard.read(self.extents[extension])


@dataclass(frozen=True)
class DecodedSample(Generic[T]):
    """A decoded sample together with its origin."""

    value: T
    """Result of the decoder."""
    origin: Provenance
    """Source, shard, key and epoch of the sample delivered."""


@dataclass(frozen=True)
class Block(Generic[T]):
    """Consecutive samples of the run."""

    number: int
    """Index of the block in the run, from 0."""
    samples: list[DecodedSample[T]]
    """``StreamOptions.block`` samples, in order."""
    replaced: list[Substitution]
    """The substitutions among ``samples``."""


@dataclass(frozen=True)
class Source:
    """A folder of shards and its weight in the mixture."""

    folder: ShardFolder
    """The indexed shards of the source."""
    weight: float = 1.0
    """Share of the run's blocks, relative to the other sources' weights."""

    def fingerprint(self) -> str:
        """A hash of the samples' content, whatever their location: data moved elsewhere keeps its order."""
        digest = hashlib.blake2b(digest_size=16)
        for shard in self.folder.index.shards:
            digest.update(f"{shard.sha256} {shard.samples}\n".encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class StreamOptions:
    """Seed, block size and shuffling of the samples."""

    seed: int = 0
    """Seed of the order."""
    block: int = 8
    """Consecutive samples that stay on one rank; images are swapped within them for image-text matching."""
    streams: int = 16
    """Logical streams of a source; each keeps one shard open. A multiple of the number of blocks in a global batch keeps
    every stream on one rank."""
    window: int = 4096
    """Number of consecutive samples of a shard that a stream shuffles together."""


def read_skip_list(path: Path) -> frozenset[str]:
    """Read the keys to leave out: one a line, ``#`` begins a comment line; :class:`UserError` if unreadable."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"skip list {path} cannot be read: {error}") from None
    return frozenset(line.strip() for line in lines if line.strip() and not line.startswith("#"))


class BlockReader(Generic[T]):
    """Reads any block of the run by its number.

    Args:
        sources: the folders of shards; all decoded by the same function.
        decode: makes a sample of its members; raises :class:`Unreadable` when it cannot.
        options: seed, block size and shuffling.
        skip: keys to leave out.
    """

    def __init__(
        self,
        sources: list[Source],
        decode: Callable[[RawSample], T],
        options: StreamOptions,
        skip: frozenset[str] = frozenset(),
    ):
        if options.block < 1:
            raise UserError(f"block must be at least 1 sample, got {options.block}")
        self._sources, self._decode, self._options, self._skip = sources, decode, options, skip
        self._mixture = Mixture([source.weight for source in sources], options.seed)
        fingerprints = [source.fingerprint() for source in sources]
        self._orders = [
            SourceOrder(source.folder.counts, options.seed, name, options.streams, options.window)
            for source, name in zip(sources, fingerprints, strict=True)
        ]
        described = [fingerprints, [source.weight for source in sources], options]
        self.order_id = hashlib.blake2b(repr(described).encode(), digest_size=8).hexdigest()
        """Hash of everything the order depends on; a run resumes only with the same one."""
        self._open = _OpenShards(sources, limit=options.streams + 2)

    def read(self, number: int) -> Block[T]:
        """Block ``number`` of the run: 0, 1, 2, ..."""
        source, ordinal = self._mixture.locate(number)
        turn, stream = divmod(ordinal, self._options.streams)
        size = self._options.block
        samples: list[DecodedSample[T]] = []
        replaced: list[Substitution] = []
        for position in range(turn * size, (turn + 1) * size):
            sample, failure = self._deliver(source, stream, position)
            samples.append(sample)
            if failure is not None:
                replaced.append(failure)
        return Block(number, samples, replaced)

    def _deliver(self, source: int, stream: int, position: int) -> tuple[DecodedSample[T], Substitution | None]:
        order = self._orders[source]
        low, high = order.stream_range(stream)
        first: tuple[Provenance, str, bool] | None = None
        # The search for a replacement starts at the same offset of the stream's next block, so that no block holds a sample
        # twice; after a shard that cannot be opened, at the same offset of the stream's next shard.
        step, tried = self._options.block, 0
        while tried < high - low:
            place = order.place(stream, position)
            opened = self._open.get(source, place.shard)
            origin = self._origin(source, place, opened)
            if isinstance(opened, Unreadable):
                reason, skipped, step, cost = str(opened), False, place.segment, place.segment
            elif origin.key in self._skip:
                reason, skipped, cost = "on the skip list", True, 1
            else:
                try:
                    raw = RawSample(origin, opened.file, opened.sidecar.samples[place.sample][1])
                    sample = DecodedSample(self._decode(raw), origin)
                    return sample, None if first is None else Substitution(first[0], first[1], origin, first[2])
                except Unreadable as error:
                    reason, skipped, cost = str(error), False, 1
            first = first or (origin, reason, skipped)
            position += step
            step, tried = 1, tried + cost
        assert first is not None
        raise UserError(
            f"{self._sources[source].folder.location}: no sample of stream {stream} can be read; first: {first[0]}: {first[1]}"
        )

    def _origin(self, source: int, place: SampleRef, opened: "_Opened | Unreadable") -> Provenance:
        folder = self._sources[source].folder
        key = "" if isinstance(opened, Unreadable) else opened.sidecar.samples[place.sample][0]
        return Provenance(folder.location, folder.index.shards[place.shard].name, key, place.epoch)

    def close(self) -> None:
        """Close all shards."""
        self._open.close()


@dataclass(frozen=True)
class _Opened:
    file: ShardFile
    sidecar: Sidecar


class _OpenShards:
    """Cache of the open shards, least recently used first; a failure to open is cached, too."""

    def __init__(self, sources: list[Source], limit: int):
        self._sources, self._limit = sources, limit
        self._shards: OrderedDict[tuple[int, int], _Opened | Unreadable] = OrderedDict()

    def get(self, source: int, shard: int) -> _Opened | Unreadable:
        if (source, shard) in self._shards:
            self._shards.move_to_end((source, shard))
            return self._shards[source, shard]
        folder = self._sources[source].folder
        opened: _Opened | Unreadable
        try:
            opened = _Opened(folder.open_shard(shard), folder.sidecar(shard))
        except Unreadable as error:
            opened = error
        self._shards[source, shard] = opened
        while len(self._shards) > self._limit * len(self._sources):
            _, oldest = self._shards.popitem(last=False)
            if isinstance(oldest, _Opened):
                oldest.file.close()
        return opened

    def close(self) -> None:
        while self._shards:
            _, opened = self._shards.popitem()
            if isinstance(opened, _Opened):
                opened.file.close()
