"""Triangles to pixels with numpy alone: fragments first, so that materials may drop some before depth decides.

Every triangle is tested against the pixel centres of its bounding box; triangles are taken in groups of similar box size,
so that each group is one block of array arithmetic.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]
Ints = NDArray[np.int64]

BOX_SIZES = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256, 512, 1024, 2048)
BLOCK_PIXELS = 1 << 20


@dataclass
class Fragments:
    """Points of triangles at pixel centres; several may share one pixel."""

    pixel: Ints
    """(n,) flat index ``row * width + column``."""
    triangle: Ints
    """(n,) index of the triangle."""
    weights: Floats
    """(n, 3) barycentric weights of the triangle's corners."""
    depth: Floats
    """(n,) larger is nearer to the camera."""

    def take(self, chosen: NDArray[np.generic]) -> "Fragments":
        """Those of a boolean or index array."""
        return Fragments(self.pixel[chosen], self.triangle[chosen], self.weights[chosen], self.depth[chosen])

    def interpolate(self, triangles: Ints, values: Floats) -> Floats:
        """Vertex values (v, k) of the mesh with these triangles (t, 3) -> values (n, k) at the fragments."""
        first, second, third = triangles[self.triangle].T
        result = values[first] * self.weights[:, :1]
        result += values[second] * self.weights[:, 1:2]
        result += values[third] * self.weights[:, 2:]
        return result


def facing(points: Floats, triangles: Ints) -> Floats:
    """Twice the signed area (t,) of projected triangles, y down; negative where counter-clockwise faces look at the camera."""
    a, b, c = (points[triangles[:, k]] for k in range(3))
    area: Floats = (b[:, 0] - a[:, 0]) * (c[:, 1] - a[:, 1]) - (c[:, 0] - a[:, 0]) * (b[:, 1] - a[:, 1])
    return area


def fragments(points: Floats, depth: Floats, triangles: Ints, drawn: NDArray[np.bool_], width: int) -> Fragments:
    """All points of the ``drawn`` triangles that lie on pixel centres of a square picture.

    ``points`` (v, 2) are pixel coordinates (x right, y down, pixel centres at .5), ``depth`` (v,) larger is nearer.
    """
    corners = points[triangles]
    # Over an axis of three, pairwise minima are much faster than a reduction.
    low = np.ceil(np.minimum(np.minimum(corners[:, 0], corners[:, 1]), corners[:, 2]) - 0.5)
    high = np.floor(np.maximum(np.maximum(corners[:, 0], corners[:, 1]), corners[:, 2]) - 0.5)
    low = np.maximum(low, 0).astype(np.int32)
    high = np.minimum(high, width - 1).astype(np.int32)
    extent = (high - low).max(1) + 1
    area = facing(points, triangles)
    usable = drawn & ((high - low).min(1) >= 0) & (np.abs(area) > 1e-7)
    parts: list[tuple[Ints, Ints, Floats]] = []
    smaller = 0
    for box in BOX_SIZES:
        group = np.flatnonzero(usable & (extent > smaller) & (extent <= box))
        smaller = box
        for block in np.array_split(group, len(group) * box * box // BLOCK_PIXELS + 1) if len(group) else []:
            parts.append(_cover(block, corners[block], area[block], low[block], high[block], box, width))
    if not parts:
        return Fragments(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros((0, 3), np.float32), np.zeros(0, np.float32))
    pixel, triangle, weights = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Fragments(pixel, triangle, weights, (depth[triangles[triangle]] * weights).sum(1))


def _cover(
    block: Ints, corners: Floats, area: Floats, low: NDArray[np.int32], high: NDArray[np.int32], box: int, width: int
) -> tuple[Ints, Ints, Floats]:
    """Pixel, triangle and weights of one group of triangles, each tested on a ``box`` x ``box`` grid from ``low``."""
    steps = np.arange(box, dtype=np.int32)
    column = low[:, :1] + steps
    row = low[:, 1:] + steps
    x = (column + np.float32(0.5) - corners[:, 0, :1])[:, None, :]
    y = (row + np.float32(0.5) - corners[:, 0, 1:])[:, :, None]
    edges = (corners[:, 1:] - corners[:, :1]) / area[:, None, None]
    (bx, by), (cx, cy) = ((edges[:, k, 0, None, None], edges[:, k, 1, None, None]) for k in range(2))
    second = x * cy - y * cx
    third = y * bx - x * by
    inside = (second >= 0) & (third >= 0) & (second + third <= 1)
    inside &= (column <= high[:, :1])[:, None, :] & (row <= high[:, 1:])[:, :, None]
    which, dy, dx = np.nonzero(inside)
    pixel = row[which, dy].astype(np.int64) * width + column[which, dx]
    b, c = second[inside], third[inside]
    return pixel, block[which], np.stack([1 - b - c, b, c], 1)


def nearest(fragments: Fragments) -> Ints:
    """Index of the nearest fragment of every covered pixel, in pixel order of first come.

    Depth is compared in 65,535 steps over its range: a counting sort then takes the place of a comparison sort.
    """
    if not len(fragments.pixel):
        return np.zeros(0, np.int64)
    span = float(fragments.depth.max() - fragments.depth.min()) or 1.0
    steps = ((fragments.depth - fragments.depth.min()) * np.float32(65535 / span)).astype(np.uint16)
    order = np.argsort(steps, kind="stable")
    last = np.full(int(fragments.pixel.max()) + 1, -1, np.int64)
    last[fragments.pixel[order]] = order
    winners: Ints = last[last >= 0]
    return winners
