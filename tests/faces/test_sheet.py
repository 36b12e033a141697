"""Contact sheets: dimensions, and what each option draws, on shards made by others."""

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gptface_dist.errors import UserError
from gptface_dist.faces.sheet import GAP, SheetOptions, contact_sheet, palette, save

CELL = 40
PLAIN = SheetOptions(count=5, columns=3, cell=CELL)
COLOR = (10, 120, 250)


def encoded(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, keys: list[str], extras: bool = True) -> None:
    """A shard as another program writes it: no index, pax headers."""
    picture = np.full((20, 20, 3), COLOR, np.uint8)
    mask = np.zeros((20, 20), np.uint8)
    mask[10:] = 3
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as shard:
        for key in keys:
            members = {"png": encoded(picture), "txt": b"a caption of several words that needs more lines than one"}
            if extras:
                members |= {
                    "mask.png": encoded(mask),
                    "json": json.dumps({"landmarks": {"a": [5.0, 5.0, True], "b": [15, 5, False]}}).encode(),
                }
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                shard.addfile(info, io.BytesIO(data))


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    write_tar(tmp_path / "b.tar", ["d", "e", "f"])
    write_tar(tmp_path / "a.tar", ["a", "b", "c"])
    return tmp_path


def cell(sheet: Image.Image, row: int, column: int) -> np.ndarray:
    left, top = GAP + column * (CELL + GAP), GAP + row * (CELL + GAP)
    return np.asarray(sheet)[top : top + CELL, left : left + CELL]


def test_dimensions_and_places(shards: Path) -> None:
    sheet = contact_sheet(shards, PLAIN)
    assert sheet.size == (3 * CELL + 4 * GAP, 2 * CELL + 3 * GAP)
    for row, column in ((0, 0), (0, 2), (1, 1)):
        assert (cell(sheet, row, column) == COLOR).all()
    assert (cell(sheet, 1, 2) == 255).all()
    assert contact_sheet(shards, replace(PLAIN, count=100, columns=2)).size == (2 * CELL + 3 * GAP, 3 * CELL + 4 * GAP)
    assert contact_sheet(shards / "b.tar", replace(PLAIN, columns=9)).size == (3 * CELL + 4 * GAP, CELL + 2 * GAP)


def test_masks_colour_all_classes_but_the_first(shards: Path) -> None:
    shown = cell(contact_sheet(shards, replace(PLAIN, masks=True)), 0, 0)
    assert (shown[: CELL // 2] == COLOR).all()
    assert (shown[CELL // 2 :] != COLOR).any(-1).all()
    assert len(np.unique(palette()[:32].round(), axis=0)) == 32


def test_landmarks_are_drawn_where_they_are(shards: Path) -> None:
    shown = cell(contact_sheet(shards, replace(PLAIN, landmarks=True)), 0, 0)
    changed = np.argwhere((shown != COLOR).any(-1))
    # (5, 5) and (15, 5) of 20 pixels, in a cell twice as large.
    for x, color in ((10, (64, 255, 64)), (30, (255, 64, 64))):
        assert (shown[10, x] == color).all()
    assert len(changed) <= 2 * 9
    assert set(changed[:, 0]) <= {9, 10, 11}


def test_captions_make_rows_higher_and_stay_in_their_columns(shards: Path) -> None:
    plain = contact_sheet(shards, PLAIN)
    sheet = contact_sheet(shards, replace(PLAIN, captions=True))
    assert sheet.width == plain.width
    assert sheet.height > plain.height + 2 * 20
    below = np.asarray(sheet)[GAP + CELL + 2 : GAP + CELL + 20]
    assert (below[:, GAP : GAP + CELL] < 128).any()
    assert (below[:, GAP + CELL : GAP + CELL + GAP] == 255).all()


def test_without_captions_or_with_damage_it_still_draws(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", ["a", "b", "c", "d"], extras=False)
    whole = (tmp_path / "a.tar").read_bytes()
    # Cut behind the second sample.
    (tmp_path / "a.tar").write_bytes(whole[: whole.index(b"c.png")])
    assert contact_sheet(tmp_path, replace(PLAIN, captions=True)).width == 2 * CELL + 3 * GAP


def test_mistakes_are_one_line(tmp_path: Path, shards: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    mistakes = [(bare, {}, "no pictures in"), (tmp_path / "nowhere", {}, "there is no")]
    write_tar(tmp_path / "bare.tar", ["a"], extras=False)
    mistakes += [(tmp_path / "bare.tar", {"masks": True}, "leave --masks out")]
    mistakes += [(tmp_path / "bare.tar", {"landmarks": True}, "leave --landmarks out")]
    (tmp_path / "text.tar").write_text("no tar at all")
    mistakes += [(tmp_path / "text.tar", {}, "no pictures in")]
    for location, options, said in mistakes:
        with pytest.raises(UserError, match=said) as caught:
            contact_sheet(location, replace(PLAIN, **options))
        assert "\n" not in str(caught.value)
    for bad in ({"count": 0}, {"columns": -1}, {"cell": 3}):
        with pytest.raises(UserError):
            replace(PLAIN, **bad)


def test_saving(tmp_path: Path) -> None:
    picture = Image.new("RGB", (7, 5), COLOR)
    for name in ("sheet.png", "sheet.jpg", "sheet.WEBP"):
        save(picture, tmp_path / name)
        with Image.open(tmp_path / name) as opened:
            assert opened.size == (7, 5)
    with pytest.raises(UserError, match="no picture format"):
        save(picture, tmp_path / "sheet.txt")
    with pytest.raises(UserError, match="cannot write"):
        save(picture, tmp_path / "nowhere/sheet.png")
    assert len(list(tmp_path.iterdir())) == 3
