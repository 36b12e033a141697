"""Light that a head keeps from itself: for every vertex, which directions are open to the sky.

Measured once on the rest mesh from many directions and kept as second-order real spherical harmonics (Ramamoorthi and
Hanrahan 2001), so that the soft shadow of a light from any direction is one small product per vertex.
"""

import numpy as np

from gptface_dist.faces.mesh import Floats, Ints
from gptface_dist.faces.raster import fragments

DIRECTIONS = 160
MAP_SIZE = 256
BIAS = 0.05


def harmonics(directions: Floats) -> Floats:
    """Second-order real spherical harmonics (n, 9) of unit vectors (n, 3)."""
    x, y, z = np.moveaxis(directions, -1, 0)
    return np.stack(
        [
            np.full_like(x, 0.282095),
            0.488603 * y,
            0.488603 * z,
            0.488603 * x,
            1.092548 * x * y,
            1.092548 * y * z,
            0.315392 * (3 * z * z - 1),
            1.092548 * x * z,
            0.546274 * (x * x - y * y),
        ],
        -1,
    )


def sphere(count: int) -> Floats:
    """``count`` unit vectors spread evenly over the sphere (a Fibonacci spiral)."""
    steps = np.arange(count) + 0.5
    z = 1 - 2 * steps / count
    turn = np.pi * (1 + np.sqrt(5)) * steps
    ring = np.sqrt(1 - z * z)
    return np.stack([ring * np.cos(turn), ring * np.sin(turn), z], 1).astype(np.float32)


def bake(points: Floats, normals: Floats, triangles: Ints) -> tuple[Floats, Floats]:
    """Visibility in harmonics (v, 9) and openness (v,) of every vertex.

    Directions below a vertex's own horizon count as open: there the cosine of the light does the darkening.
    """
    directions = sphere(DIRECTIONS)
    coefficients = np.zeros((len(points), 9), np.float32)
    seen = np.zeros(len(points), np.float32)
    sky = np.zeros(len(points), np.float32)
    basis = harmonics(directions)
    for direction, harmonic in zip(directions, basis, strict=True):
        cosine = normals @ direction
        above = cosine > 0
        lit = _lit(points + normals * BIAS, points, triangles, direction)
        coefficients += np.where(above, lit, 1.0).astype(np.float32)[:, None] * harmonic * (4 * np.pi / DIRECTIONS)
        seen += np.where(above, cosine * lit, 0)
        sky += np.where(above, cosine, 0)
    openness = np.where(sky > 0, seen / np.maximum(sky, 1e-6), 1).astype(np.float32)
    return coefficients, openness


def _lit(probes: Floats, points: Floats, triangles: Ints, direction: Floats) -> Floats:
    """1 where a probe sees the sky in a direction, 0 where the mesh is in the way: an orthographic depth map."""
    helper = np.array([0, 1, 0] if abs(direction[1]) < 0.9 else [1, 0, 0], np.float32)
    right = np.cross(helper, direction)
    right /= np.linalg.norm(right)
    up = np.cross(direction, right)
    frame = np.stack([right, up], 1)
    flat = points @ frame
    low, high = flat.min(0), flat.max(0)
    scale = (MAP_SIZE - 2) / float((high - low).max())
    pixels = ((flat - low) * scale + 1).astype(np.float32)
    depth = points @ direction
    drawn = fragments(pixels, depth, triangles, np.ones(len(triangles), bool), MAP_SIZE)
    nearest = np.full(MAP_SIZE * MAP_SIZE, -1e9, np.float32)
    np.maximum.at(nearest, drawn.pixel, drawn.depth)
    place = np.clip(((probes @ frame - low) * scale + 1).astype(int), 0, MAP_SIZE - 1)
    return (probes @ direction + BIAS >= nearest[place[:, 1] * MAP_SIZE + place[:, 0]]).astype(np.float32)
