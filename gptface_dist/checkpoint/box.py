"""Boxes of a tensor: flat ranges of a shard as axis-parallel boxes of the whole."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from gptface_dist.model.parameters import Cut


@dataclass(frozen=True)
class Box:
    """An axis-parallel part of a tensor."""

    offsets: tuple[int, ...]
    """Its first element."""
    sizes: tuple[int, ...]
    """Its shape."""

    @property
    def numel(self) -> int:
        """Elements in it."""
        return math.prod(self.sizes)


def boxes(start: int, stop: int, shape: tuple[int, ...]) -> Iterator[Box]:
    """Elements ``[start, stop)`` of a flattened tensor as boxes, in order, each a contiguous run: at most ``2 n - 1`` for
    n axes (of a matrix: the end of a row, whole rows, the beginning of a row).
    """
    if start >= stop:
        return
    if len(shape) == 1:
        yield Box((start,), (stop - start,))
        return
    inner = math.prod(shape[1:])
    first, last = -(-start // inner), stop // inner
    if first > last:
        # Within one row.
        yield from _in_row(last, start, stop, shape)
        return
    yield from _in_row(first - 1, start, first * inner, shape)
    if first < last:
        yield Box((first, *(0 for _ in shape[1:])), (last - first, *shape[1:]))
    yield from _in_row(last, last * inner, stop, shape)


def _in_row(row: int, start: int, stop: int, shape: tuple[int, ...]) -> Iterator[Box]:
    base = row * math.prod(shape[1:])
    for box in boxes(start - base, stop - base, shape[1:]):
        yield Box((row, *box.offsets), (1, *box.sizes))


def rows(box: Box, limit: int) -> Iterator[Box]:
    """The box in parts of at most ``limit`` elements, cut along its first axis that is longer than 1; at least a row each."""
    axis = next((axis for axis, size in enumerate(box.sizes) if size > 1), 0)
    each = max(1, limit * box.sizes[axis] // max(1, box.numel))
    for start in range(0, box.sizes[axis], each):
        yield _narrow(box, axis, start, min(each, box.sizes[axis] - start))


def in_whole(box: Box, cut: Cut | None, shape: tuple[int, ...], rank: int, size: int) -> Iterator[tuple[Box, Box]]:
    """A box of a tensor-parallel shard -> (part of it, the same elements as a box of the whole of ``shape``).

    Padding is in no part.
    """
    if cut is None:
        yield box, box
        return
    first, many = box.offsets[cut.axis], box.sizes[cut.axis]
    for here, there, length in cut.spans(shape[cut.axis], rank, size):
        start, stop = max(first, here), min(first + many, here + length)
        if start < stop:
            part = _narrow(box, cut.axis, start - first, stop - start)
            offsets = (*box.offsets[: cut.axis], there + start - here, *box.offsets[cut.axis + 1 :])
            yield part, Box(offsets, part.sizes)


def _narrow(box: Box, axis: int, start: int, length: int) -> Box:
    offsets = (*box.offsets[:axis], box.offsets[axis] + start, *box.offsets[axis + 1 :])
    return Box(offsets, (*box.sizes[:axis], length, *box.sizes[axis + 1 :]))
