"""Hair sheets, hats and face masks cut once to the rest head; on a face they follow its morphed surface."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gptface_dist.faces.head_model import BODY, HeadModel
from gptface_dist.faces.mesh import Binding, Floats, Ints, grid_triangles, unit

# The vertical axis that azimuths are measured around: 0 in front, positive towards the subject's left.
AXIS_Z = 0.35
SKULL_CENTRE = np.array([0, 7.45, AXIS_Z], np.float32)
AZIMUTHS, LEVELS = 96, 84
FLOOR, CEILING = 5.0, 8.6

# Azimuth (degrees from the front) -> height where hair begins on the rest head.
HAIRLINE = np.array(
    [
        (0, 8.04), (12, 8.05), (22, 8.02), (32, 7.93), (40, 7.80), (46, 7.64), (52, 7.42), (56, 7.2), (60, 7.08),
        (65, 7.08), (68, 7.36), (72, 7.43), (90, 7.43), (95, 7.25), (99, 6.9), (108, 6.62), (130, 6.46), (180, 6.42),
    ],
    np.float32,
)  # fmt: skip


def azimuth(rest: Floats) -> Floats:
    """Degrees (n,) of rest points (n, 3) around the head's axis, -180..180."""
    return np.rad2deg(np.arctan2(rest[:, 0], rest[:, 2] - np.float32(AXIS_Z))).astype(np.float32)


def above_hairline(rest: Floats) -> Floats:
    """Height (n,) of rest points over the hairline at their azimuth, decimetres."""
    line = np.interp(np.abs(azimuth(rest)), HAIRLINE[:, 0], HAIRLINE[:, 1]).astype(np.float32)
    return rest[:, 1] - line


@dataclass(frozen=True)
class Sheet:
    """A surface cut to the rest head."""

    rest: Floats
    """(n, 3) rest places."""
    triangles: Ints
    """(t, 3) indices into ``rest``."""
    binding: Binding
    """How its points follow the head."""


@dataclass(frozen=True)
class Wardrobe:
    """All sheets of one head model."""

    scalp_vertices: Ints
    """(s,) vertices of the head that hair and hats grow out of."""
    scalp_triangles: Ints
    """(t, 3) their triangles, as indices into ``scalp_vertices``."""
    scalp_rest: Floats
    """(s, 3) their rest places."""
    scalp_out: Floats
    """(s, 3) unit directions from the middle of the skull."""
    curtain: Sheet
    """Hair that hangs: from the crown, round the back and sides, down past the shoulders."""
    fringe: Sheet
    """Hair over the forehead."""
    mask: Sheet
    """A face mask from the bridge of the nose to under the chin, ear to ear."""
    brim: Sheet
    """The peak of a cap."""

    @classmethod
    def of(cls, model: HeadModel) -> "Wardrobe":
        """Cut everything to the rest head; a few tenths of a second."""
        body = model.triangles[model.part == BODY]
        radius = _radius_map(model.rest, body)
        allowed = np.zeros(len(model.rest), bool)
        allowed[body.ravel()] = True
        on_head = allowed & (model.openness > 0.05) & (model.rest[:, 1] > 6.0)
        off_face = on_head & ((np.abs(azimuth(model.rest)) > 62) | (model.rest[:, 1] > 7.65))
        scalp = body[(model.rest[body][..., 1].min(1) > 6.2) & _scalp(model.rest[body].mean(1))]
        vertices, inverse = np.unique(scalp, return_inverse=True)
        return cls(
            scalp_vertices=vertices,
            scalp_triangles=inverse.reshape(-1, 3),
            scalp_rest=model.rest[vertices],
            scalp_out=unit(model.rest[vertices] - SKULL_CENTRE),
            curtain=_curtain(radius, model.rest, off_face),
            fringe=_fringe(radius, model.rest, off_face),
            mask=_mask(radius, model.rest, on_head),
            brim=_brim(radius, model.rest, on_head),
        )


def _scalp(places: Floats) -> NDArray[np.bool_]:
    return above_hairline(places) > -0.25


def _radius_map(rest: Floats, triangles: Ints) -> Floats:
    """Outermost distance (LEVELS, AZIMUTHS) from the axis, by height and azimuth; from points strewn over the mesh."""
    corners = rest[triangles]
    steps = [(a, b, 1 - a - b) for a in np.linspace(0, 1, 9) for b in np.linspace(0, 1 - a, 9)]
    points = np.concatenate([np.einsum("c,tck->tk", np.array(weights, np.float32), corners) for weights in steps])
    points = points[(np.abs(points[:, 0]) < 1.3) & (points[:, 1] > FLOOR - 0.1)]
    column = np.round((azimuth(points) + 180) / 360 * AZIMUTHS).astype(int) % AZIMUTHS
    row = np.clip((points[:, 1] - FLOOR) / (CEILING - FLOOR) * LEVELS, 0, LEVELS - 1).astype(int)
    radius = np.zeros((LEVELS, AZIMUTHS), np.float32)
    np.maximum.at(radius, (row, column), np.hypot(points[:, 0], points[:, 2] - AXIS_Z))
    # Gaps between points take their neighbours' mean; above the crown the radius stays zero.
    for _ in range(4):
        around = np.stack([np.roll(radius, 1, 1), np.roll(radius, -1, 1)])
        radius = np.where(radius == 0, around.max(0), radius)
    return (radius + np.roll(radius, 1, 1) + np.roll(radius, -1, 1)) / 3


def _look_up(radius: Floats, degrees: Floats, heights: Floats) -> Floats:
    """Radius at azimuths and heights of equal shape, bilinear."""
    x = (degrees + 180) / 360 * AZIMUTHS
    y = np.clip((heights - FLOOR) / (CEILING - FLOOR) * LEVELS - 0.5, 0, LEVELS - 1.001)
    x0, y0 = np.floor(x).astype(int), np.floor(y).astype(int)
    tx, ty = x - x0, y - y0

    def row(level: NDArray[np.int64]) -> Floats:
        return radius[level, x0 % AZIMUTHS] * (1 - tx) + radius[level, (x0 + 1) % AZIMUTHS] * tx

    return (row(y0) * (1 - ty) + row(y0 + 1) * ty).astype(np.float32)


def _points(degrees: Floats, heights: Floats, radius: Floats) -> Floats:
    angle = np.deg2rad(degrees)
    return np.stack([radius * np.sin(angle), heights, AXIS_Z + radius * np.cos(angle)], -1).reshape(-1, 3).astype(np.float32)


def _sheet(points: Floats, shape: tuple[int, int], surface: Floats, allowed: NDArray[np.bool_]) -> Sheet:
    return Sheet(points, grid_triangles(*shape), Binding.of(points, surface, allowed))


def _curtain(radius: Floats, surface: Floats, allowed: NDArray[np.bool_]) -> Sheet:
    # From the crown the sheet lies on the head; where the head draws in, it falls straight and tucks in a little.
    heights, degrees = np.meshgrid(np.linspace(8.3, 5.0, 34), np.linspace(24, 336, 72), indexing="ij")
    degrees = np.where(degrees > 180, degrees - 360, degrees)
    reach = np.maximum.accumulate(_look_up(radius, degrees, np.maximum(heights, 6.9)), 0)
    reach = (reach + 0.10) * (1 - 0.10 * np.clip((6.8 - heights) / 1.0, 0, 1))
    # In front it lies on the chest.
    chest = np.minimum(_look_up(radius, degrees, heights), 1.3) + 0.05
    points = _points(degrees, heights, np.where((heights < 6.0) & (np.abs(degrees) < 80), np.maximum(reach, chest), reach))
    return _sheet(points, heights.shape, surface, allowed)


def _fringe(radius: Floats, surface: Floats, allowed: NDArray[np.bool_]) -> Sheet:
    heights, degrees = np.meshgrid(np.linspace(8.34, 7.45, 16), np.linspace(-62, 62, 36), indexing="ij")
    reach = _look_up(radius, degrees, np.minimum(heights, 8.2))
    lift = 0.035 + 0.11 * np.sin(np.pi * np.clip((heights - 7.45) / 0.95, 0, 1))
    return _sheet(_points(degrees, heights, reach + lift), heights.shape, surface, allowed)


def _mask(radius: Floats, surface: Floats, allowed: NDArray[np.bool_]) -> Sheet:
    fraction, degrees = np.meshgrid(np.linspace(0, 1, 22), np.linspace(-66, 66, 41), indexing="ij")
    side = np.abs(degrees) / 66
    top = 7.16 - 0.20 * side**2
    bottom = 6.13 + 0.32 * side**1.5
    heights = top + (bottom - top) * fraction
    reach = _look_up(radius, degrees, heights)
    # Cloth spans hollows: along each vertical line, no point lies inside the chord of two others.
    for column in range(reach.shape[1]):
        reach[:, column] = _upper_hull(-heights[:, column], reach[:, column])
    return _sheet(_points(degrees, heights, reach + 0.05), heights.shape, surface, allowed)


def _upper_hull(x: Floats, y: Floats) -> Floats:
    """The smallest concave function over points with rising ``x``, at those ``x``."""
    kept: list[int] = []
    for k in range(len(x)):
        while len(kept) > 1:
            a, b = kept[-2], kept[-1]
            if (y[b] - y[a]) * (x[k] - x[a]) > (y[k] - y[a]) * (x[b] - x[a]):
                break
            kept.pop()
        kept.append(k)
    return np.interp(x, x[kept], y[kept]).astype(np.float32)


def _brim(radius: Floats, surface: Floats, allowed: NDArray[np.bool_]) -> Sheet:
    forward, degrees = np.meshgrid(np.linspace(0, 1, 8), np.linspace(-52, 52, 25), indexing="ij")
    side = np.abs(degrees) / 52
    heights = 7.97 - 0.10 * side**2 - 0.24 * forward * (1 + 0.6 * side**2)
    # It begins a little inside the cap.
    reach = _look_up(radius, degrees, np.full_like(degrees, 7.93)) + 0.04
    return _sheet(_points(degrees, heights, reach + 0.8 * forward * np.sqrt(1.02 - side**2)), heights.shape, surface, allowed)
