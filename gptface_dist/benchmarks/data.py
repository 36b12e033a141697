"""Benchmark of reading samples, as a ratio to a bare webdataset loop over the same files in the same run."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptface_dist.data import tokens
from gptface_dist.data.batch import BatchBuilder, BatchOptions
from gptface_dist.data.folder import ShardFolder
from gptface_dist.data.masking import MaskingOptions
from gptface_dist.data.pictures import EXTENSIONS, PictureDecoder
from gptface_dist.data.stream import BlockReader, Source, StreamOptions
from gptface_dist.errors import UserError

BASELINE = "webdataset loop"


@dataclass(frozen=True)
class Speed:
    """Samples a second of one way to read the same files."""

    name: str
    """Name of the way of reading."""
    rounds: list[float]
    """Samples/s of each round."""
    ratios: list[float]
    """Samples/s relative to the baseline of the same round."""


def compare(folder: Path, seconds: float, rounds: int, progress: Callable[[str], None]) -> list[Speed]:
    """Time each way to read ``folder`` in turn, ``rounds`` times, in one process; the first is the baseline.

    Every way is warmed up once, so that all of them read from the page cache.
    """
    opened = ShardFolder.open(folder)
    if opened.index.samples < 64:
        raise UserError(f"{folder} holds {opened.index.samples} samples: a benchmark needs at least 64")
    ways = {BASELINE: _webdataset(opened), **(_tokens(opened) if opened.index.kind == tokens.KIND else _pictures(opened))}
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(-1, rounds):
        for name, way in ways.items():
            progress(name if turn >= 0 else f"warm-up: {name}")
            speed = _time(way, seconds if turn >= 0 else seconds / 4)
            if turn >= 0:
                speeds[name].append(speed)
    base = speeds[BASELINE]
    return [Speed(name, own, [a / b for a, b in zip(own, base, strict=True)]) for name, own in speeds.items()]


def _time(way: Callable[[], Iterator[int]], seconds: float) -> float:
    """Samples a second; ``way`` yields the number of samples read since its last yield."""
    samples, began = 0, time.perf_counter()
    while True:
        for count in way():
            samples += count
            elapsed = time.perf_counter() - began
            if elapsed >= seconds:
                return samples / elapsed


def _webdataset(folder: ShardFolder) -> Callable[[], Iterator[int]]:
    """The simplest loop over decoded samples: files in order, no shuffling, no checks."""
    import webdataset as wds

    urls = [str(Path(folder.location) / shard.name) for shard in folder.index.shards]
    wanted = {"txt", "json", *EXTENSIONS}

    def needed(name: str) -> bool:
        return folder.index.kind == tokens.KIND or name.rsplit("/", 1)[-1].partition(".")[2] in wanted

    def loop() -> Iterator[int]:
        for _ in wds.WebDataset(urls, shardshuffle=False, select_files=needed).decode("rgb8"):
            yield 1

    return loop


def _blocks(reader: Callable[[], BlockReader[Any]], use: Callable[[Any], Any]) -> Callable[[], Iterator[int]]:
    def loop() -> Iterator[int]:
        blocks, number = reader(), 0
        while True:
            block = blocks.read(number)
            use(block)
            yield len(block.samples)
            number += 1

    return loop


def _options(folder: ShardFolder) -> StreamOptions:
    return StreamOptions(streams=min(16, folder.index.samples))


def _tokens(folder: ShardFolder) -> dict[str, Callable[[], Iterator[int]]]:
    vocabulary = tokens.recorded_vocabulary(folder.index.meta)
    if vocabulary is None:
        raise UserError(f"the index of {folder.location} names no vocabulary: make the shards with `gptface data tokenize`")
    grid = tokens.read_grid(folder.index.meta, folder.location)
    build = BatchBuilder(vocabulary, grid, 0, MaskingOptions(), BatchOptions())

    def reader() -> BlockReader[tokens.TokenSample]:
        return BlockReader([Source(folder)], tokens.TokenDecoder(vocabulary), _options(folder))

    return {
        "samples, shuffled and checked": _blocks(reader, lambda block: block),
        "batches, masked, paired and padded": _blocks(reader, lambda block: build([block])),
    }


def _pictures(folder: ShardFolder) -> dict[str, Callable[[], Iterator[int]]]:
    def reader() -> BlockReader[Any]:
        return BlockReader([Source(folder)], PictureDecoder(None), _options(folder))

    return {"pictures and captions, shuffled and checked": _blocks(reader, lambda block: block)}
