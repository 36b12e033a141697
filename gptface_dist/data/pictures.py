"""Samples of picture shards: pixels and captions."""

import io
import json
from dataclasses import dataclass

import numpy as np
from PIL import Image

from gptface_dist.data.folder import Unreadable
from gptface_dist.data.stream import RawSample

EXTENSIONS = ("jpg", "jpeg", "png", "webp")
"""Extensions of pictures, in the order they are looked for."""


@dataclass(frozen=True)
class PictureSample:
    """A picture with its captions."""

    pixels: np.ndarray
    """uint8 [S, S, 3], RGB."""
    captions: list[str]
    """What the shard says of it: ``key.txt`` first, then further ``captions`` of ``key.json``."""


def decode_pixels(data: bytes, size: int | None) -> np.ndarray:
    """Encoded picture -> uint8 [S, S, 3], the middle square, resized to ``size`` (None: as it is, [H, W, 3]).

    Transparency is laid over white; the orientation tag of photographs is obeyed. Raises :class:`Unreadable`.
    """
    try:
        with Image.open(io.BytesIO(data)) as opened:
            return _square(opened, size)
    # PIL raises what its many decoders raise: OSError, SyntaxError, ValueError, struct.error, DecompressionBombError, ...
    except Exception as error:
        raise Unreadable(f"unreadable picture: {error}") from None


def _square(image: Image.Image, size: int | None) -> np.ndarray:
    orientation = image.getexif().get(0x0112, 1)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    if orientation in (3, 6, 8):
        image = image.rotate({3: 180, 6: 270, 8: 90}[orientation], expand=True)
    if size is not None and image.size != (size, size):
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.resize((size, size), Image.Resampling.LANCZOS, (left, top, left + side, top + side), reducing_gap=3.0)
    return np.asarray(image)


def picture_extension(extensions: list[str] | dict[str, object]) -> str:
    """The extension of a sample's picture; :class:`Unreadable` when it has none."""
    for extension in EXTENSIONS:
        if extension in extensions:
            return extension
    raise Unreadable(f"no picture: none of .{', .'.join(EXTENSIONS)} among {', '.join(extensions) or 'its members'}")


def decode_captions(text: bytes, more: bytes | None) -> list[str]:
    """``key.txt`` and the list ``captions`` of ``key.json``, without repeats; :class:`Unreadable` when the first is
    empty or not UTF-8.
    """
    try:
        caption = text.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise Unreadable(f"the caption is not UTF-8: {error.reason} at byte {error.start}") from None
    if not caption:
        raise Unreadable("the caption is empty")
    found = [caption]
    if more is not None:
        try:
            fields = json.loads(more)
        except ValueError as error:
            raise Unreadable(f"the .json member is not JSON: {error}") from None
        listed = fields.get("captions", []) if isinstance(fields, dict) else []
        if isinstance(listed, list):
            found += [text.strip() for text in listed if isinstance(text, str) and text.strip()]
    return list(dict.fromkeys(found))


class PictureDecoder:
    """Decodes samples of picture shards to square pictures of one size."""

    def __init__(self, size: int | None):
        self.size = size

    def __call__(self, raw: RawSample) -> PictureSample:
        """Pixels and captions of a sample."""
        captions = decode_captions(raw.read("txt"), raw.read("json") if "json" in raw.extents else None)
        return PictureSample(decode_pixels(raw.read(picture_extension(list(raw.extents))), self.size), captions)
