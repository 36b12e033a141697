"""Samples of picture shards: pixels and captions."""

import io
import json
from dataclasses import dataclass

import numpy as np
from PIL import ExifTags, Image

from gptface_dist.data.folder import Unreadable
from gptface_dist.data.stream import RawSample

EXTENSIONS = ("jpg", "jpeg", "png", "webp")
"""Extensions of pictures; a sample's picture is the first of these that it has."""


# Transpose operation that turns a picture upright, by its EXIF orientation.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class PictureSample:
    """A picture with its captions."""

    pixels: np.ndarray
    """uint8 [S, S, 3], RGB."""
    captions: list[str]
    """``key.txt`` first, then further ``captions`` of ``key.json``, without repeats."""


def decode_pixels(data: bytes, size: int | None) -> np.ndarray:
    """Encoded picture -> uint8 [S, S, 3], the middle square, resized to ``size`` (None: as it is, [H, W, 3]).

    A smaller picture is enlarged: all samples of a run have one size, and the maker of the data decides which pictures are
    too small. Transparency is laid over white; the EXIF orientation is applied. Raises :class:`Unreadable`.
    """
    try:
        with Image.open(io.BytesIO(data)) as opened:
            return _square(opened, size)
    # PIL raises what its many decoders raise: OSError, SyntaxError, ValueError, struct.error, DecompressionBombError, ...
    except Exception as error:
        raise Unreadable(f"unreadable picture: {error}") from None


def _square(image: Image.Image, size: int | None) -> np.ndarray:
    turn = _TURNS.get(_orientation(image))
    if image.mode.startswith("I;16"):
        # Pillow would clip 16 bits to 8 instead of scaling them.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    if turn is not None:
        image = image.transpose(turn)
    if size is not None and image.size != (size, size):
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        # Cut first: resize's own box lets the filter reach beyond it.
        image = image.crop((left, top, left + side, top + side))
        image = image.resize((size, size), Image.Resampling.LANCZOS, reducing_gap=3.0)
    return np.asarray(image)


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation; 1 (upright) where there is none or the EXIF is broken, which leaves the picture itself whole."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:
        return 1


def picture_extension(extensions: list[str] | dict[str, object]) -> str:
    """The extension of a sample's picture; :class:`Unreadable` when it has none."""
    for extension in EXTENSIONS:
        if extension in extensions:
            return extension
    raise Unreadable(f"no picture: none of .{', .'.join(EXTENSIONS)} among {', '.join(extensions) or 'its members'}")


def decode_captions(text: bytes, more: bytes | None) -> list[str]:
    """``key.txt`` and the list ``captions`` of ``key.json``, without repeats; :class:`Unreadable` when the first is
    empty or not UTF-8, or the second is not JSON.
    """
    try:
        caption = text.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise Unreadable(f"the caption is not UTF-8: {error.reason} at byte {error.start}") from None
    if not caption:
        raise Unreadable("the caption is empty")
    captions = [caption, *(further_captions(more) if more is not None else [])]
    return list(dict.fromkeys(captions))


def further_captions(data: bytes) -> list[str]:
    """The list ``captions`` of a ``key.json``, [] without such a list; :class:`Unreadable` when it is not JSON."""
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"the .json member is not JSON: {error}") from None
    listed = fields.get("captions") if isinstance(fields, dict) else None
    return [text.strip() for text in listed if isinstance(text, str) and text.strip()] if isinstance(listed, list) else []


def decode_members(members: dict[str, bytes], size: int | None) -> PictureSample:
    """A sample's members by extension -> pixels and captions; :class:`Unreadable` where one is missing or broken."""
    if "txt" not in members:
        raise Unreadable("no .txt member")
    captions = decode_captions(members["txt"], members.get("json"))
    return PictureSample(decode_pixels(members[picture_extension(list(members))], size), captions)


class PictureDecoder:
    """Decodes samples of picture shards to square pictures of one size."""

    def __init__(self, size: int | None):
        self.size = size

    def __call__(self, raw: RawSample) -> PictureSample:
        """Read and decode one sample; :class:`Unreadable` where a member is missing or broken."""
        wanted = (picture_extension(list(raw.extents)), "txt", "json")
        return decode_members({name: raw.read(name) for name in wanted if name in raw.extents}, self.size)
