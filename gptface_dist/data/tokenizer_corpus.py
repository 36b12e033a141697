"""Pictures and captions of a folder of shards, for the training and evaluation of tokenizers."""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gptface_dist.data.folder import ShardFile, ShardFolder, Unreadable
from gptface_dist.data.loader import BatchSharding, Loader, Position
from gptface_dist.data.pictures import decode_captions, decode_pixels, picture_extension
from gptface_dist.data.shards import Sidecar
from gptface_dist.data.stream import Block, BlockReader, Provenance, RawSample, Source, StreamOptions
from gptface_dist.errors import UserError
from gptface_dist.tokenizers.processes import Processes

STREAMS = 16
"""Logical streams that training reads, if the folder holds enough pictures."""
EVALUATION_BATCH = 16
"""Pictures of one evaluation batch."""
CPU = torch.device("cpu")

SampleRef = tuple[int, int]
"""Index of a shard in the folder, and of a sample in the shard, both from 0."""


def open_pictures(location: str) -> ShardFolder:
    """Open a folder (or URL) of picture shards; :class:`UserError` where it is missing, not indexed, or of tokens."""
    folder = ShardFolder.open(location)
    if folder.index.kind != "pictures":
        raise UserError(f"{location} holds {folder.index.kind}, not pictures")
    return folder


def spread(folder: ShardFolder, count: int) -> list[SampleRef]:
    """``count`` samples at even distances from the first one on; a function of the folder and the count alone."""
    total = folder.index.samples
    if not 0 < count <= total:
        raise UserError(f"{folder.location} holds {total} pictures: {count} cannot be chosen from them")
    starts = np.concatenate([[0], np.cumsum(folder.counts)])
    numbers = np.arange(count) * total // count
    # side="right": empty shards start at the same number as the next shard that holds samples, which comes last.
    shards = np.searchsorted(starts, numbers, side="right") - 1
    return [(int(shard), int(number - starts[shard])) for shard, number in zip(shards, numbers, strict=True)]


def pictures_at(folder: ShardFolder, places: Sequence[SampleRef], size: int) -> Iterator[Tensor]:
    """Batches of the pictures at ``places`` (sorted), float32 [B, 3, size, size] in [-1, 1]; unreadable ones are skipped."""
    pictures: list[np.ndarray] = []
    for shard in dict.fromkeys(shard for shard, _ in places):
        file, sidecar = _open(folder, shard)
        with closing(file):
            for sample in (sample for number, sample in places if number == shard):
                try:
                    pictures.append(_decode(_raw(folder, shard, file, sidecar, sample), size))
                except Unreadable:
                    continue
                if len(pictures) == EVALUATION_BATCH:
                    yield _to_tensor(np.stack(pictures))
                    pictures = []
    if pictures:
        yield _to_tensor(np.stack(pictures))


def captions(folder: ShardFolder, on_sample: Callable[[bool], None]) -> Iterator[str]:
    """All captions of all samples, from front to back.

    ``on_sample`` is called after each sample with whether its captions could be read; unreadable ones are skipped.
    """
    for shard in range(len(folder.index.shards)):
        file, sidecar = _open(folder, shard)
        with closing(file):
            for sample in range(len(sidecar.samples)):
                raw = _raw(folder, shard, file, sidecar, sample)
                try:
                    texts = decode_captions(raw.read("txt"), raw.read("json") if "json" in raw.extents else None)
                except Unreadable:
                    on_sample(False)
                    continue
                yield from texts
                on_sample(True)


@dataclass(frozen=True)
class TrainingPictures:
    """The pictures of a folder for an image tokenizer: an endless order for training, and a held-out set."""

    folder: ShardFolder
    """The indexed picture shards."""
    size: int
    """Side of the square pictures, in pixels."""
    seed: int
    """Seed of the order."""
    held_out: int
    """Pictures kept out of training, chosen by :func:`spread`."""

    def __post_init__(self) -> None:
        total = self.folder.index.samples
        if not 0 < self.held_out <= (total - 1) // 2:
            raise UserError(
                f"{self.folder.location} holds {total} pictures, {self.held_out} cannot be held out: "
                "hold out at least one and less than half of them"
            )

    @functools.cached_property
    def places(self) -> list[SampleRef]:
        """Addresses of the held-out pictures, sorted."""
        return spread(self.folder, self.held_out)

    @functools.cached_property
    def order_id(self) -> str:
        """Hash of the pictures and their order."""
        with closing(self._reader()) as reader:
            return reader.order_id

    def batches(self, batch: int, processes: Processes, workers: int, first_step: int) -> Iterator[Tensor]:
        """Yield this process's share of step ``first_step`` and of every later step.

        Float32 [batch / processes, 3, size, size] in [-1, 1], on the process's device; the shares in the order of
        ranks are the global batch, which depends on the data, the seed and the step alone.
        """
        sharding = BatchSharding(batch, processes.share(batch), block=1, rank=processes.rank, ranks=processes.count)
        loader = Loader(self._reader, _stack, sharding, workers)
        for pictures, _ in loader.steps(Position(first_step * sharding.blocks, self.order_id)):
            yield _to_tensor(pictures[0], processes.device)

    def held_out_batches(self) -> Iterator[Tensor]:
        """The held-out pictures in batches, as :func:`pictures_at`."""
        return pictures_at(self.folder, self.places, self.size)

    @functools.cached_property
    def _reader(self) -> Callable[[], BlockReader[np.ndarray]]:
        # The reader searches at most one stream's length for a replacement, into the stream's next epoch with its new order:
        # a stream more than twice as long as the held-out set always has one.
        streams = min(STREAMS, self.folder.index.samples // (2 * self.held_out + 1))
        options = StreamOptions(seed=self.seed, block=1, streams=streams)
        sidecars = {shard: _sidecar(self.folder, shard) for shard in dict.fromkeys(shard for shard, _ in self.places)}
        keys = frozenset(sidecars[shard].samples[sample][0] for shard, sample in self.places)
        decode = functools.partial(_decode, size=self.size)
        return functools.partial(BlockReader[np.ndarray], [Source(self.folder)], decode, options, keys)


def _open(folder: ShardFolder, shard: int) -> tuple[ShardFile, Sidecar]:
    sidecar = _sidecar(folder, shard)
    try:
        return folder.open_shard(shard), sidecar
    except Unreadable as error:
        raise _unusable(folder, shard, error) from None


def _sidecar(folder: ShardFolder, shard: int) -> Sidecar:
    try:
        return folder.sidecar(shard)
    except Unreadable as error:
        raise _unusable(folder, shard, error) from None


def _unusable(folder: ShardFolder, shard: int, error: Unreadable) -> UserError:
    return UserError(f"{folder.location}, shard {folder.index.shards[shard].name}: {error}")


def _raw(folder: ShardFolder, shard: int, file: ShardFile, sidecar: Sidecar, sample: int) -> RawSample:
    key, extents = sidecar.samples[sample]
    return RawSample(Provenance(folder.location, folder.index.shards[shard].name, key, 0), file, extents)


def _decode(raw: RawSample, size: int) -> np.ndarray:
    """uint8 [size, size, 3] of a sample; its captions are not read."""
    return decode_pixels(raw.read(picture_extension(list(raw.extents))), size)


def _stack(blocks: list[Block[np.ndarray]]) -> np.ndarray:
    return np.stack([sample.value for block in blocks for sample in block.samples])


def _to_tensor(pictures: np.ndarray, device: torch.device = CPU) -> Tensor:
    """uint8 [B, S, S, 3] -> float32 [B, 3, S, S] in [-1, 1] on a device, with the arithmetic of :mod:`~.tokenize`."""
    source = torch.from_numpy(pictures)
    if device.type == "cuda":
        # Copied as bytes, a quarter of the floats, and from pinned memory: from pageable memory the copy would synchronise.
        source = source.pin_memory().to(device, non_blocking=True)
    return source.permute(0, 3, 1, 2).to(torch.float32) / 127.5 - 1
