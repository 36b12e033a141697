"""Contact sheets: the first pictures of any shards, with their masks, landmarks and captions."""

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from gptface_dist.data.folder import Unreadable
from gptface_dist.data.pictures import decode_captions, decode_pixels, picture_extension
from gptface_dist.data.tar import Damage, Hashing, Sample, samples
from gptface_dist.errors import UserError
from gptface_dist.files import write_atomically

GAP = 4
FONT_SIZE = 11
CAPTION_LINES = 9
MASK_SHARE = 0.55
"""Opacity of the parsing mask over the picture."""
SEEN, HIDDEN = (64, 255, 64), (255, 64, 64)
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".webp": "WEBP"}
_MASK = "mask.png"


@dataclass(frozen=True)
class SheetOptions:
    """Size and layers of a contact sheet."""

    count: int = 64
    """Pictures, fewer where the shards hold fewer."""
    columns: int = 8
    """Pictures in a row."""
    cell: int = 128
    """Pixels of a side that every picture is brought to (its middle square)."""
    masks: bool = False
    """Lay the parsing mask over each picture, one colour a class; class 0 stays as it is."""
    landmarks: bool = False
    """Dots at landmarks: green ones are seen, red ones hidden."""
    captions: bool = False
    """Write the caption under each picture."""

    def __post_init__(self) -> None:
        for name in ("count", "columns"):
            if getattr(self, name) < 1:
                raise UserError(f"a sheet needs at least 1 for --{name}, not {getattr(self, name)}")
        if not 16 <= self.cell <= 1024:
            raise UserError(f"--cell must be within 16 and 1024 pixels, not {self.cell}")


def contact_sheet(location: Path, options: SheetOptions) -> Image.Image:
    """The first samples of a folder of shards, or of one ``.tar``, in rows, left to right.

    Shards need no index, only the layout of webdataset (``key.jpg|jpeg|png|webp``, ``key.txt``, and for the extras
    ``key.mask.png`` and ``key.json`` with ``landmarks``: name -> [x, y, seen]). :class:`UserError` where there are none,
    where a picture cannot be read, and where an extra is asked for that a sample lacks. Damage of a tar is passed over.
    """
    font = ImageFont.load_default(FONT_SIZE)
    cells = [_cell(sample, options, font) for sample in _first(location, options.count)]
    columns = min(options.columns, len(cells))
    rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    heights = [max(cell.height for cell in row) for row in rows]
    width = columns * options.cell + (columns + 1) * GAP
    sheet = Image.new("RGB", (width, sum(heights) + (len(rows) + 1) * GAP), "white")
    top = GAP
    for row, height in zip(rows, heights, strict=True):
        for column, cell in enumerate(row):
            sheet.paste(cell, (GAP + column * (options.cell + GAP), top))
        top += height + GAP
    return sheet


def save(picture: Image.Image, path: Path) -> None:
    """Write a sheet; the file name's ending tells the format."""
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"no picture format {path.suffix!r} of {path}: use {', '.join(FORMATS)}")
    buffer = io.BytesIO()
    picture.save(buffer, FORMATS[path.suffix.lower()])
    try:
        write_atomically(path, buffer.getvalue())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def _first(location: Path, count: int) -> list[Sample]:
    """The first samples with a picture."""
    if location.is_dir():
        shards = sorted(location.glob("*.tar"))
    elif location.is_file():
        shards = [location]
    else:
        raise UserError(f"there is no {location}: give a folder of shards or one .tar file")
    chosen: list[Sample] = []
    for sample in _samples(shards):
        if len(chosen) == count:
            break
        try:
            picture_extension(list(sample.members))
        except Unreadable:
            continue
        chosen.append(sample)
    if not chosen:
        raise UserError(f"no pictures in {location}: it must hold .tar files with members key.jpg, key.png or key.webp")
    return chosen


def _samples(shards: list[Path]) -> Iterator[Sample]:
    for path in shards:
        with path.open("rb") as file:
            for item in samples(Hashing(file)):
                if not isinstance(item, Damage):
                    yield item


def _cell(sample: Sample, options: SheetOptions, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> Image.Image:
    """One picture with its extras; as wide as a cell, as high as its caption needs."""
    members = sample.members
    try:
        pixels = decode_pixels(members[picture_extension(list(members))].data, None)
        caption = decode_captions(members["txt"].data, None)[0] if options.captions and "txt" in members else ""
    except Unreadable as error:
        raise UserError(f"sample {sample.key}: {error}: look for more with `gptface data verify`") from None
    if options.masks:
        pixels = _overlaid(pixels, _labels(sample, pixels))
    cell = _square(Image.fromarray(pixels), options.cell)
    if options.landmarks:
        _mark(cell, _landmarks(sample), pixels.shape[1], pixels.shape[0])
    if not options.captions:
        return cell
    lines = _wrapped(caption, options.cell, font)
    height = FONT_SIZE + 3
    tall = Image.new("RGB", (options.cell, options.cell + 2 + height * len(lines)), "white")
    tall.paste(cell, (0, 0))
    draw = ImageDraw.Draw(tall)
    for number, line in enumerate(lines):
        draw.text((0, options.cell + 2 + number * height), line, "black", font)
    return tall


def _square(picture: Image.Image, cell: int) -> Image.Image:
    """The middle square; small pictures are enlarged without smoothing, so that their pixels are seen."""
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    how = Image.Resampling.NEAREST if side <= cell else Image.Resampling.LANCZOS
    return picture.crop((left, top, left + side, top + side)).resize((cell, cell), how)


def _labels(sample: Sample, pixels: np.ndarray) -> np.ndarray:
    if _MASK not in sample.members:
        raise UserError(f"sample {sample.key} has no .{_MASK}: leave --masks out")
    try:
        with Image.open(io.BytesIO(sample.members[_MASK].data)) as opened:
            labels = np.asarray(opened)
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"sample {sample.key}: unreadable .{_MASK}: {error}") from None
    if labels.shape != pixels.shape[:2] or labels.dtype != np.uint8:
        raise UserError(f"sample {sample.key}: its .{_MASK} is no eight-bit picture of {pixels.shape[1]}x{pixels.shape[0]}")
    return labels


def _overlaid(pixels: np.ndarray, labels: np.ndarray) -> np.ndarray:
    mixed = (1 - MASK_SHARE) * pixels + MASK_SHARE * palette()[labels]
    return np.where(labels[..., None] > 0, mixed + 0.5, pixels).astype(np.uint8)


def palette() -> np.ndarray:
    """A colour (256, 3) for every class: hues by the golden ratio, so that neighbours differ."""
    number = np.arange(256)
    hue = (number * 0.618034) % 1 * 6
    bright = np.where(number % 2, 255, 200)[:, None]
    # The usual sawtooth of hue to red, green, blue.
    ramp = np.clip(np.abs((hue[:, None] + np.array([0, 4, 2])) % 6 - 3) - 1, 0, 1)
    return ramp * bright


def _landmarks(sample: Sample) -> dict[str, Any]:
    try:
        landmarks = json.loads(sample.members["json"].data)["landmarks"]
        return {name: (float(x), float(y), bool(seen)) for name, (x, y, seen) in landmarks.items()}
    except (KeyError, ValueError, TypeError, AttributeError):
        raise UserError(f"sample {sample.key} has no landmarks in its .json: leave --landmarks out") from None


def _mark(cell: Image.Image, points: dict[str, Any], width: int, height: int) -> None:
    side = min(width, height)
    draw = ImageDraw.Draw(cell)
    radius = max(1, cell.width / 100)
    for x, y, seen in points.values():
        across = (x - (width - side) // 2) * cell.width / side
        down = (y - (height - side) // 2) * cell.width / side
        draw.ellipse((across - radius, down - radius, across + radius, down + radius), SEEN if seen else HIDDEN)


def _wrapped(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """Lines no wider than ``width`` pixels (a longer word is cut by the cell's edge), CAPTION_LINES at most."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines if len(lines) <= CAPTION_LINES else [*lines[: CAPTION_LINES - 1], "..."]
