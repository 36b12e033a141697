"""The rasteriser against a plain point-in-triangle test of every pixel centre."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptface_dist.faces.raster import facing, fragments, nearest


def brute_force(points: np.ndarray, triangles: np.ndarray, width: int) -> dict[tuple[int, int], np.ndarray]:
    """(pixel, triangle) -> barycentric weights, in double precision, for pixel centres well inside; None near an edge."""
    found = {}
    for number, corners in enumerate(points[triangles].astype(np.float64)):
        matrix = np.vstack([corners.T, np.ones(3)])
        if abs(np.linalg.det(matrix)) < 1e-3:
            continue
        inverse = np.linalg.inv(matrix)
        for row in range(width):
            for column in range(width):
                weights = inverse @ [column + 0.5, row + 0.5, 1]
                if weights.min() > -1e-3:
                    found[row * width + column, number] = weights
    return found


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 20), st.sampled_from([1.0, 5.0, 30.0]))
def test_fragments_are_the_pixel_centres_inside(seed: int, width: int, spread: float) -> None:
    random = np.random.default_rng(seed)
    # Triangles of all sizes, some of them outside the picture.
    centres = random.uniform(-0.2 * width, 1.2 * width, (12, 1, 2))
    points = (centres + random.normal(0, spread, (12, 3, 2))).reshape(-1, 2).astype(np.float32)
    triangles = np.arange(36).reshape(12, 3)
    depth = random.uniform(0.5, 1.5, 36).astype(np.float32)
    wanted = brute_force(points, triangles, width)
    found = fragments(points, depth, triangles, np.ones(12, bool), width)
    area = facing(points, triangles)
    solid = np.abs(area[found.triangle]) > 1e-2
    got = {(int(p), int(t)): w for p, t, w in zip(found.pixel[solid], found.triangle[solid], found.weights[solid], strict=True)}
    assert len(got) == solid.sum(), "a pixel was found twice in one triangle"
    assert set(got) <= set(wanted)
    # Only centres within a rounding error of an edge may be judged differently.
    assert all(wanted[key].min() < 1e-3 or abs(area[key[1]]) < 1e-1 for key in set(wanted) - set(got))
    for key, weights in got.items():
        if abs(area[key[1]]) > 1:
            np.testing.assert_allclose(weights, wanted[key], atol=2e-3)
    np.testing.assert_allclose(found.depth, (depth[triangles[found.triangle]] * found.weights).sum(1), rtol=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_nearest_takes_the_nearest_of_every_pixel(seed: int) -> None:
    random = np.random.default_rng(seed)
    points = random.uniform(0, 16, (60, 2)).astype(np.float32)
    depth = random.uniform(0.5, 1.5, 60).astype(np.float32)
    found = fragments(points, depth, np.arange(60).reshape(20, 3), np.ones(20, bool), 16)
    winners = nearest(found)
    assert sorted(found.pixel[winners]) == sorted(set(found.pixel.tolist()))
    step = (found.depth.max() - found.depth.min()) / 65535 if len(found.pixel) else 0
    for winner in winners:
        rivals = found.depth[found.pixel == found.pixel[winner]]
        assert found.depth[winner] >= rivals.max() - 1.01 * step


def test_triangles_that_are_not_drawn_leave_no_fragments() -> None:
    points = np.array([[0, 0], [8, 0], [0, 8]], np.float32)
    depth, triangles = np.ones(3, np.float32), np.array([[0, 1, 2]])
    assert len(fragments(points, depth, triangles, np.array([True]), 8).pixel) == 36
    empty = fragments(points, depth, triangles, np.array([False]), 8)
    assert len(empty.pixel) == len(nearest(empty)) == 0


@pytest.mark.parametrize(("corners", "sign"), [([[0, 0], [0, 4], [4, 0]], -1), ([[0, 0], [4, 0], [0, 4]], 1)])
def test_facing_tells_the_side(corners: list[list[int]], sign: int) -> None:
    """In a picture with y down, corners that run counter-clockwise to the eye have negative area."""
    assert facing(np.array(corners, np.float32), np.array([[0, 1, 2]]))[0] == sign * 16
