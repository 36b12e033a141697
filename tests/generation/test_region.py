"""Regions: what words describe, which tokens they touch, and how pictures are laid over each other."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from gptface_dist.errors import UserError
from gptface_dist.faces import materials
from gptface_dist.generation import region as regions
from gptface_dist.generation.region import LABELS, feathered, grown, region, tokens_of


def test_classes_are_those_of_rendered_faces() -> None:
    assert LABELS == materials.LABELS
    assert all(name in LABELS for names in regions.GROUPS.values() for name in names)


def test_box() -> None:
    chosen = region("2,1, 5,3", 8)
    assert chosen.shape == (8, 8)
    assert chosen.dtype == bool
    assert [(int(y), int(x)) for y, x in np.argwhere(chosen)] == [(y, x) for y in (1, 2) for x in (2, 3, 4)]


def test_parts_of_the_face_lie_in_the_picture() -> None:
    for name in regions.PLACES:
        for size in (16, 48, 64, 128):
            assert 0 < region(name, size).mean() < 0.6, name


def test_mask_file_is_cut_and_scaled_as_pictures_are(tmp_path: Path) -> None:
    mask = np.zeros((8, 12), dtype=np.uint8)
    mask[2:4, 4:8] = 255
    mask[:, 0] = 255  # outside the middle square
    Image.fromarray(mask).save(tmp_path / "m.png")
    assert (region(str(tmp_path / "m.png"), 8) == (mask[:, 2:10] > 0)).all()
    assert (region(str(tmp_path / "m.png"), 16) == np.kron(mask[:, 2:10] > 0, np.ones((2, 2), bool))).all()


def test_parsing_class(tmp_path: Path) -> None:
    numbers = np.zeros((8, 8), dtype=np.uint8)
    numbers[1, 2], numbers[3, 4], numbers[5, 5] = LABELS.index("left_eye"), LABELS.index("right_eye"), LABELS.index("hair")
    parsing = tmp_path / "mask.png"
    Image.fromarray(numbers).save(parsing)
    assert (region("hair", 8, parsing) == (numbers == LABELS.index("hair"))).all()
    assert np.argwhere(region("eyes", 8, parsing)).tolist() == [[1, 2], [3, 4]]
    for described, said in (("hat", "shows no hat"), ("beard", "no class 'beard'")):
        with pytest.raises(UserError, match=said):
            region(described, 8, parsing)
    Image.fromarray(np.full((8, 8), 99, np.uint8)).save(parsing)
    with pytest.raises(UserError, match="holds the number 99"):
        region("hair", 8, parsing)
    Image.new("RGB", (8, 8)).save(parsing)
    with pytest.raises(UserError, match="has the mode RGB"):
        region("hair", 8, parsing)


@pytest.mark.parametrize("box", ["0,0,9,4", "-1,0,4,4", "4,4,4,8", "5,1,3,2"])
def test_boxes_outside_or_empty_are_refused(box: str) -> None:
    with pytest.raises(UserError, match="no box inside the picture, which is 8x8"):
        region(box, 8)


def test_other_words_and_empty_masks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no box .*, no file and no part of the face"):
        region("elbow", 8)
    Image.new("L", (8, 8)).save(tmp_path / "black.png")
    with pytest.raises(UserError, match="is empty"):
        region(str(tmp_path / "black.png"), 8)
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    with pytest.raises(UserError, match="cannot be read as a picture"):
        region(str(tmp_path / "broken.png"), 8)


@given(seed=st.integers(0, 10**6), factor=st.sampled_from([1, 2, 4]))
def test_tokens_are_those_with_a_pixel_of_the_region(seed: int, factor: int) -> None:
    chosen = np.random.default_rng(seed).random((8, 8)) < 0.1
    tokens = tokens_of(chosen, factor)
    for row in range(8 // factor):
        for column in range(8 // factor):
            pixels = [chosen[row * factor + i, column * factor + j] for i in range(factor) for j in range(factor)]
            assert tokens[row, column] == any(pixels)


def distance(chosen: np.ndarray) -> np.ndarray:
    """Steps to the nearest pixel outside, by brute force; inf where there is none."""
    outside = np.argwhere(~chosen)
    steps = np.full(chosen.shape, np.inf)
    for y, x in np.argwhere(chosen):
        if len(outside):
            steps[y, x] = np.abs(outside - (y, x)).sum(axis=1).min()
    return steps


@settings(deadline=None)
@given(seed=st.integers(0, 10**6), width=st.integers(0, 4))
def test_feathering_by_brute_force(seed: int, width: int) -> None:
    rng = np.random.default_rng(seed)
    chosen = np.zeros((10, 10), dtype=bool)
    for _ in range(2):
        top, left = rng.integers(0, 8, 2)
        chosen[top : top + rng.integers(2, 9), left : left + rng.integers(2, 9)] = True
    original, drawn = (rng.integers(0, 256, (10, 10, 3)).astype(np.uint8) for _ in range(2))
    mixed = feathered(original, drawn, chosen, width)
    assert mixed.dtype == np.uint8
    assert (mixed[~chosen] == original[~chosen]).all()
    share = np.minimum(distance(chosen), width + 1)[chosen, None] / (width + 1)
    wanted = share * drawn[chosen] + (1 - share) * original[chosen]
    assert np.abs(mixed[chosen].astype(float) - wanted).max() <= 0.5 + 1e-9


@given(seed=st.integers(0, 10**6), by=st.integers(0, 3))
def test_grown_regions_reach_as_far_as_said(seed: int, by: int) -> None:
    chosen = np.random.default_rng(seed).random((9, 9)) < 0.05
    inside = np.argwhere(chosen)
    for y in range(9):
        for x in range(9):
            near = len(inside) > 0 and np.abs(inside - (y, x)).sum(axis=1).min() <= by
            assert grown(chosen, by)[y, x] == near
