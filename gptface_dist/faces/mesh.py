"""Triangle meshes: normals, and points that follow a morphed surface."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]
Ints = NDArray[np.int64]


def unit(vectors: Floats) -> Floats:
    """Vectors (..., 3) at length 1."""
    return vectors / (np.linalg.norm(vectors, axis=-1, keepdims=True) + np.float32(1e-9))


def normals(points: Floats, triangles: Ints) -> Floats:
    """Vertex normals (v, 3): the mean of the adjacent triangles' normals weighted by area; zero where there are none."""
    a, b, c = (points[triangles[:, k]] for k in range(3))
    across = np.cross(b - a, c - a)
    flat = triangles.T.ravel()
    total = np.stack([np.bincount(flat, np.tile(across[:, axis], 3), len(points)) for axis in range(3)], 1)
    return unit(total.astype(np.float32))


def grid_triangles(rows: int, columns: int) -> Ints:
    """Triangles of a grid of vertices ``row * columns + column``, counter-clockwise where columns run right and rows down."""
    row, column = np.mgrid[: rows - 1, : columns - 1]
    a = (row * columns + column).ravel()
    right, below, across = a + 1, a + columns, a + columns + 1
    return np.concatenate([np.stack([a, below, across], 1), np.stack([a, across, right], 1)])


@dataclass(frozen=True)
class Binding:
    """Points that follow a surface: each moves as the nearest surface vertices do, weighted by inverse distance."""

    vertices: Ints
    """(n, k) surface vertices."""
    weights: Floats
    """(n, k) their shares; rows sum to 1."""

    @classmethod
    def of(cls, points: Floats, surface: Floats, allowed: NDArray[np.bool_], neighbours: int = 6) -> "Binding":
        """Bind rest points (n, 3) to the ``allowed`` vertices of a rest surface (v, 3)."""
        candidates = np.flatnonzero(allowed)
        nearest, weight = [], []
        for block in np.array_split(points, len(points) // 256 + 1):
            distance = ((block[:, None] - surface[candidates][None]) ** 2).sum(-1)
            chosen = np.argpartition(distance, neighbours, axis=1)[:, :neighbours]
            near = np.sqrt(np.take_along_axis(distance, chosen, 1))
            share = 1 / (near + 0.05)
            nearest.append(candidates[chosen])
            weight.append(share / share.sum(1, keepdims=True))
        return cls(np.concatenate(nearest), np.concatenate(weight).astype(np.float32))

    def displacement(self, moves: Floats) -> Floats:
        """Surface displacements (v, 3) -> the points' displacements (n, 3)."""
        return np.einsum("nk,nkc->nc", self.weights, moves[self.vertices])
