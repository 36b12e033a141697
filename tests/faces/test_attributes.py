"""What faces are drawn: a function of (seed, number), every value possible, none contradictory."""

from collections import Counter
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptface_dist.faces import attributes as a
from gptface_dist.faces.attributes import Attributes, draw_attributes, stream

CHOICES = {
    "gender": a.GENDERS,
    "age": a.AGES,
    "head_shape": a.HEAD_SHAPES,
    "skin": a.SKINS,
    "hair_style": a.HAIR_STYLES,
    "hair_color": a.HAIR_COLORS,
    "eye_color": a.EYE_COLORS,
    "beard": a.BEARDS,
    "glasses": a.GLASSES,
    "hat": a.HATS,
    "hat_color": tuple(a.COLORS),
    "covering": a.COVERINGS,
    "covering_color": tuple(a.COLORS),
    "lipstick": a.LIPSTICKS,
    "clothes": a.CLOTHES,
    "clothes_color": tuple(a.COLORS),
    "background": a.BACKGROUNDS,
    "background_color": tuple(a.COLORS),
    "expression": a.EXPRESSIONS,
    "fringe": (False, True),
    "thick_eyebrows": (False, True),
    "earrings": (False, True),
    "freckles": (False, True),
    "eyes_closed": (False, True),
}


@pytest.fixture(scope="module")
def faces() -> list[Attributes]:
    return [draw_attributes(11, number) for number in range(3000)]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 2**40))
def test_the_same_numbers_draw_the_same_face(seed: int, number: int) -> None:
    face = draw_attributes(seed, number)
    draw_attributes(seed + 1, number + 5)
    assert draw_attributes(seed, number) == face
    assert draw_attributes(seed, number + 1) != face
    assert draw_attributes(seed + 1, number) != face


def test_every_value_occurs_and_no_other(faces: list[Attributes]) -> None:
    for name, choices in CHOICES.items():
        seen = Counter(getattr(face, name) for face in faces)
        assert set(seen) == set(choices), name
        assert min(seen.values()) >= 5, (name, seen)


def test_every_field_is_a_choice_an_angle_or_the_seed() -> None:
    assert {field.name for field in fields(Attributes)} == {
        *CHOICES, "yaw", "pitch", "roll", "light_azimuth", "light_height", "variation",
    }  # fmt: skip


def test_angles_stay_in_their_ranges(faces: list[Attributes]) -> None:
    for name, low, high in (
        ("yaw", -40, 40),
        ("pitch", -16, 16),
        ("roll", -12, 12),
        ("light_azimuth", -70, 70),
        ("light_height", 8, 52),
    ):
        values = np.array([getattr(face, name) for face in faces])
        assert low <= values.min() < values.max() <= high, name
    yaw = np.array([face.yaw for face in faces])
    assert (yaw > a.TURNED).mean() > 0.05
    assert (yaw < -a.TURNED).mean() > 0.05


def test_what_cannot_be_is_not_drawn(faces: list[Attributes]) -> None:
    for face in faces:
        assert face.beard == "none" or (face.gender == "male" and face.age != "child")
        assert not face.fringe or face.hair_style in ("short", "medium", "long")
        assert not face.eyes_closed or face.expression in ("neutral", "happy")


def test_values_are_plain(faces: list[Attributes]) -> None:
    """JSON of a face is the face: no numpy types inside."""
    for face in faces[:50]:
        assert all(type(value) in (str, bool, float, int) for value in face.to_json().values())
        assert Attributes(**face.to_json()) == face


def test_streams_differ_by_every_part_of_their_key() -> None:
    first = {stream(*key).integers(1 << 62).item() for key in ((1, 2), (2, 1), (1, 3), (1, 2, 1), (0, 1, 2))}
    assert len(first) == 5
