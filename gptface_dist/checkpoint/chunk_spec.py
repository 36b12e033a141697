"""Boxes of a tensor: flat ranges of a shard as axis-parallel chunk_specs of the whole."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from gptface_dist.model.parameters import TensorParallelSharding


@dataclass(frozen=True)
class ChunkSpec:
    """An axis-parallel part of a tensor."""

    offsets: tuple[int, ...]
    """Its first element."""
    sizes: tuple[int, ...]
    """Its shape."""

    @property
    def numel(self) -> int:
        """Elements in it."""
        return math.prod(self.sizes)


def chunk_specs(start: int, stop: int, shape: tuple[int, ...]) -> Iterator[ChunkSpec]:
    """Elements ``[start, stop)`` of a flattened tensor as chunk_specs, in order, each a contiguous run: at most ``2 n - 1`` for
    n axes (of a matrix: the end of a row, whole rows, the beginning of a row).
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
    for box in chunk_specs(start - base, stop - base, shape[1:]):
        yield ChunkSpec((row, *box.offsets), (1, *box.sizes))


def rows(box: ChunkSpec, limit: int) -> Iterator[ChunkSpec]:
    """The box in parts of at most ``limit`` elements, cut along its first axis that is longer than 1; at least a row each."""
    axis = next((axis for axis, size in enumerate(box.sizes) if size > 1), 0)
    each = max(1, limit * box.sizes[axis] // max(1, box.numel))
    for start in range(0, box.sizes[axis], each):
        yield _narrow(box, axis, start, min(each, box.sizes[axis] - start))


def in_whole(
    box: ChunkSpec, sharding: TensorParallelSharding | None, shape: tuple[int, ...], rank: int, size: int
) -> Iterator[tuple[ChunkSpec, ChunkSpec]]:
    """A box of a tensor-parallel shard -> (part of it, the same elements as a box of the whole of ``shape``).

    Padding is in no part.
    """
    if sharding is None:
        yield box, box
        return
    first, many = box.offsets[sharding.axis], box.sizes[sharding.axis]
    for here, there, length in sharding.spans(shape[sharding.axis], rank, size):
        start, stop = max(first, here), min(first + many, here + length)
        if start < stop:
            part = _narrow(box, sharding.axis, start - first, stop - start)
            offsets = (*box.offsets[: sharding.axis], there + start - here, *box.offsets[sharding.axis + 1 :])
            yield part, ChunkSpec(offsets, part.sizes)


def _narrow(box: ChunkSpec, axis: int, start: int, length: int) -> ChunkSpec:
    offsets = (*box.offsets[:axis], box.offsets[axis] + start, *box.offsets[axis + 1 :])
    return ChunkSpec(offsets, (*box.sizes[:axis], length, *box.sizes[axis + 1 :]))
