"""Axis-parallel chunks of a tensor: how flat ranges of a shard map to chunks of the whole tensor."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from gptface_dist.model.parameters import TensorParallelSharding


@dataclass(frozen=True)
class ChunkSpec:
    """An axis-parallel chunk of a tensor."""

    offsets: tuple[int, ...]
    """Index of the chunk's first element in the tensor, by axis."""
    sizes: tuple[int, ...]
    """Shape of the chunk."""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.sizes)


def chunk_specs(start: int, stop: int, shape: tuple[int, ...]) -> Iterator[ChunkSpec]:
    """Cover elements ``[start, stop)`` of a flattened tensor by contiguous chunks, in order: at most ``2 n - 1`` for n axes (of
    a matrix: the end of a row, whole rows, the beginning of a row).
    """
    if start >= stop:
        return
    if len(shape) == 1:
        yield ChunkSpec((start,), (stop - start,))
        return
    inner = math.prod(shape[1:])
    first, last = -(-start // inner), stop // inner
    if first > last:
        # Within one row.
        yield from _in_row(last, start, stop, shape)
        return
    yield from _in_row(first - 1, start, first * inner, shape)
    if first < last:
        yield ChunkSpec((first, *(0 for _ in shape[1:])), (last - first, *shape[1:]))
    yield from _in_row(last, last * inner, stop, shape)


def _in_row(row: int, start: int, stop: int, shape: tuple[int, ...]) -> Iterator[ChunkSpec]:
    base = row * math.prod(shape[1:])
    for chunk in chunk_specs(start - base, stop - base, shape[1:]):
        yield ChunkSpec((row, *chunk.offsets), (1, *chunk.sizes))


def rows(chunk: ChunkSpec, limit: int) -> Iterator[ChunkSpec]:
    """Split a chunk along its first axis longer than 1 into parts of at most ``limit`` elements, or one row if that is more."""
    axis = next((axis for axis, size in enumerate(chunk.sizes) if size > 1), 0)
    each = max(1, limit * chunk.sizes[axis] // max(1, chunk.numel))
    for start in range(0, chunk.sizes[axis], each):
        yield _narrow(chunk, axis, start, min(each, chunk.sizes[axis] - start))


def in_whole(
    chunk: ChunkSpec, sharding: TensorParallelSharding | None, shape: tuple[int, ...], rank: int, size: int
) -> Iterator[tuple[ChunkSpec, ChunkSpec]]:
    """Map a chunk of a tensor-parallel shard to pairs (part of the chunk, the same elements in the whole tensor of ``shape``).

    Padding of the shard is in no part.
    """
    if sharding is None:
        yield chunk, chunk
        return
    first, count = chunk.offsets[sharding.axis], chunk.sizes[sharding.axis]
    for local, whole, length in sharding.spans(shape[sharding.axis], rank, size):
        start, stop = max(first, local), min(first + count, local + length)
        if start < stop:
            part = _narrow(chunk, sharding.axis, start - first, stop - start)
            offsets = (*chunk.offsets[: sharding.axis], whole + start - local, *chunk.offsets[sharding.axis + 1 :])
            yield part, ChunkSpec(offsets, part.sizes)


def _narrow(chunk: ChunkSpec, axis: int, start: int, length: int) -> ChunkSpec:
    offsets = (*chunk.offsets[:axis], chunk.offsets[axis] + start, *chunk.offsets[axis + 1 :])
    return ChunkSpec(offsets, (*chunk.sizes[:axis], length, *chunk.sizes[axis + 1 :]))
