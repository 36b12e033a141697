"""Pixels and captions of picture samples, against arrays drawn by hand and Pillow's own turning of photographs."""

import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from gptface_dist.data.folder import Unreadable
from gptface_dist.data.pictures import decode_captions, decode_members, decode_pixels, further_captions, picture_extension
from tests.picture_shards import png, sample


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def gradient(height: int, width: int) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows * 255 // height, columns * 255 // width, np.full_like(rows, 60)], -1).astype(np.uint8)


def test_pixels_come_as_they_are() -> None:
    pixels = gradient(20, 30)
    assert np.array_equal(decode_pixels(encoded(Image.fromarray(pixels)), None), pixels)
    square = gradient(20, 20)
    assert np.array_equal(decode_pixels(encoded(Image.fromarray(square)), 20), square)


@pytest.mark.parametrize("shape", [(40, 60), (60, 40)])
def test_the_middle_square_is_taken(shape: tuple[int, int]) -> None:
    pixels = np.zeros((*shape, 3), np.uint8)
    top, left = (shape[0] - 40) // 2, (shape[1] - 40) // 2
    pixels[top : top + 40, left : left + 40] = 200
    assert (decode_pixels(encoded(Image.fromarray(pixels)), 20) == 200).all()


def test_a_small_picture_is_enlarged() -> None:
    found = decode_pixels(encoded(Image.new("RGB", (3, 5), (10, 20, 30))), 16)
    assert found.shape == (16, 16, 3)
    assert (found == [10, 20, 30]).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_brought_upright(orientation: int) -> None:
    image = Image.fromarray(gradient(16, 24))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(image, exif=exif)
    with Image.open(io.BytesIO(data)) as opened:
        assert np.array_equal(decode_pixels(data, None), np.asarray(ImageOps.exif_transpose(opened)))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_a_broken_exif_does_not_lose_the_picture() -> None:
    data = encoded(Image.new("RGB", (8, 8), "red"), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff broken")
    assert decode_pixels(data, None).shape == (8, 8, 3)


def test_transparency_lies_over_white() -> None:
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    image.putpixel((0, 0), (255, 0, 0, 255))
    found = decode_pixels(encoded(image), None)
    assert found[0, 0].tolist() == [255, 0, 0]
    assert found[1, 1].tolist() == [255, 255, 255]


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "CMYK", "I;16"])
def test_other_modes_become_rgb(mode: str) -> None:
    if mode == "I;16":
        image = Image.fromarray(np.full((4, 4), 128 << 8, np.uint16))
    else:
        image = Image.new("L", (4, 4), 128).convert(mode)
    found = decode_pixels(encoded(image, "TIFF" if mode == "CMYK" else "PNG"), None)
    assert found.shape == (4, 4, 3)
    assert mode == "1" or (abs(found.astype(int) - 128) <= 1).all()


@pytest.mark.parametrize("data", [b"", b"no picture", png(1)[:150], png(1)[:20] + b"x" + png(1)[21:]])
def test_what_is_no_picture_is_unreadable(data: bytes) -> None:
    with pytest.raises(Unreadable, match="unreadable picture"):
        decode_pixels(data, 8)


@pytest.mark.parametrize("form", ["JPEG", "WEBP", "PNG"])
def test_every_truncated_picture_is_unreadable(form: str) -> None:
    data = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)), form)
    for length in range(0, len(data) * 9 // 10, 97):
        with pytest.raises(Unreadable):
            decode_pixels(data[:length], 8)


def test_captions() -> None:
    assert decode_captions(" ein Gesicht ü\n".encode(), None) == ["ein Gesicht ü"]
    assert decode_captions(b"a", b'{"captions": ["b", " a ", "", 3, "b"], "width": 7}') == ["a", "b"]
    assert decode_captions(b"a", b'{"captions": "no list"}') == ["a"]
    assert decode_captions(b"a", b"[1]") == ["a"]


@pytest.mark.parametrize(("text", "reason"), [(b"", "empty"), (b" \n", "empty"), (b"caf\xe9", "not UTF-8.* at byte 3")])
def test_what_is_no_caption_is_unreadable(text: bytes, reason: str) -> None:
    with pytest.raises(Unreadable, match=reason):
        decode_captions(text, None)


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe\xff", b"[" * 100_000])
def test_what_is_no_json_is_unreadable(data: bytes) -> None:
    with pytest.raises(Unreadable, match="not JSON"):
        further_captions(data)


def test_members() -> None:
    _, members = sample(3)
    found = decode_members(members, None)
    assert found.captions == ["face 3", "one more"]
    assert np.array_equal(found.pixels, decode_pixels(png(3), None))
    with pytest.raises(Unreadable, match=r"no \.txt"):
        decode_members({"png": png(3)}, None)
    with pytest.raises(Unreadable, match=r"no picture: none of \.jpg, \.jpeg, \.png, \.webp among txt"):
        decode_members({"txt": b"a"}, None)
    assert picture_extension(["txt", "webp", "png"]) == "png"
