"""Pictures: pixels with the codes that the model reads; reading and writing of files."""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from gptface_dist.data.folder import Unreadable
from gptface_dist.data.pictures import decode_pixels
from gptface_dist.errors import UserError, one_line
from gptface_dist.files import write_atomically

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
"""Ending of a file's name -> Pillow's name of the format. Only PNG keeps pixels exactly."""


@dataclass(frozen=True)
class Picture:
    """A picture with its codes."""

    pixels: np.ndarray
    """uint8 [S, S, 3], RGB."""
    codes: np.ndarray
    """int64 [h, w]: what the model reads. An edited picture keeps the codes it was drawn with: encoding its pixels again
    would change tokens outside the next edit's region."""
    text: str = ""
    """The text of the call that drew it; empty for a picture from a file."""
    match: float | None = None
    """p(match) with :attr:`text`; None for a picture from a file."""

    @property
    def image(self) -> Image.Image:
        """The pixels as a Pillow image."""
        return Image.fromarray(self.pixels)


def open_image(path: Path) -> Image.Image:
    """Load an image file in its own mode and size; :class:`UserError` where it is missing or unreadable."""
    try:
        with Image.open(path) as opened:
            opened.load()
            return opened.copy()
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: give a picture") from None
    # PIL raises what its many decoders raise: OSError, SyntaxError, ValueError, struct.error, DecompressionBombError, ...
    except Exception as error:
        raise UserError(f"{path} cannot be read as a picture: {one_line(error)}") from None


def read_pixels(source: Path | str | Image.Image | np.ndarray, size: int, resize: bool) -> np.ndarray:
    """Cut the middle square of a picture, as training does: uint8 [size, size, 3].

    :class:`UserError` where the source is no picture, or has another size and ``resize`` is off.
    """
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3:
            raise UserError(f"pixels must be uint8 [height, width, 3], not {source.dtype} {list(source.shape)}")
        source = Image.fromarray(source)
    if isinstance(source, Image.Image):
        buffer = io.BytesIO()
        source.save(buffer, "PNG")
        data, name = buffer.getvalue(), "the image"
    else:
        name = str(source)
        try:
            data = Path(source).read_bytes()
        except OSError as error:
            raise UserError(f"{name} cannot be read: {error.strerror}") from None
    try:
        pixels = decode_pixels(data, size if resize else None)
    except Unreadable as error:
        raise UserError(f"{name}: {error}") from None
    if pixels.shape[:2] != (size, size):
        actual = f"{pixels.shape[1]}x{pixels.shape[0]}"
        raise UserError(
            f"{name} has {actual} pixels, the model's pictures {size}x{size}: pass resize (--resize) to cut and scale it"
        )
    return pixels


def check_out(path: Path) -> Path:
    """Refuse a file that could not be written, before any work is done."""
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"{path} ends in {path.suffix or 'nothing'}: pictures are written as {', '.join(FORMATS)}")
    if not path.parent.is_dir():
        raise UserError(f"no folder {path.parent} for {path.name}: make it first")
    if path.is_dir():
        raise UserError(f"{path} is a folder: give the name of a file")
    return path


def write_image(image: Image.Image, path: Path) -> None:
    """Write an image file whole or not at all, in the format of its ending."""
    buffer = io.BytesIO()
    image.save(buffer, FORMATS[path.suffix.lower()], **({} if path.suffix.lower() == ".png" else {"quality": 95}))
    try:
        write_atomically(path, buffer.getvalue())
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None


def strip(images: list[Image.Image], columns: int, gap: int = 2) -> Image.Image:
    """Lay images of one size side by side on white, ``columns`` in a row; return a single one unchanged."""
    if len(images) == 1:
        return images[0]
    columns = min(columns, len(images))
    width, height = images[0].size
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for number, image in enumerate(images):
        sheet.paste(image, (number % columns * (width + gap), number // columns * (height + gap)))
    return sheet
