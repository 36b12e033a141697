"""`gptface faces` as a user runs it: lines on stdout, exit statuses, mistakes in one line."""

from pathlib import Path

import pytest
from PIL import Image

from tests.program import gptface


def test_render_extend_and_look(tmp_path: Path) -> None:
    out, picture = tmp_path / "faces", tmp_path / "sheet.png"
    status, said, error = gptface("faces", "render", out, "--count", "3", "--size", "32", "--workers", "1")
    assert (status, error) == (0, "")
    assert said.startswith("3 faces (0 rendered before, ")
    assert said.endswith(f" a minute) in {out}\n")
    assert gptface("faces", "render", out, "--count", "3", "--size", "32") == (0, f"3 faces (3 rendered before) in {out}\n", "")
    status, said, error = gptface("faces", "render", out, "--count", "2", "--size", "32")
    assert (status, said) == (2, "")
    assert "beyond --count 2" in error
    assert error.count("\n") == 1
    options = ["--count", "2", "--columns", "2", "--cell", "64", "--masks", "--landmarks", "--captions"]
    status, said, error = gptface("faces", "sheet", out, picture, *options)
    assert (status, error) == (0, "")
    with Image.open(picture) as opened:
        assert said == f"{opened.width}x{opened.height} pixels in {picture}\n"
        assert opened.width == 2 * 64 + 3 * 4


def test_photos(tmp_path: Path) -> None:
    told = f"400 photographs in {tmp_path / 'orl'}; credit AT&T Laboratories Cambridge\n"
    assert gptface("faces", "photos", tmp_path / "orl", "--size", "32") == (0, told, "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["render", "out", "--count", "0"], "count of faces must be within"),
        (["render", "out", "--count", "1", "--size", "7"], "not 7"),
        (["render", "out", "--count", "1", "--format", "bmp"], "use png, jpg, webp"),
        (["render", "{file}", "--count", "1"], "is a file: give a folder"),
        (["render", "{file}/out", "--count", "1"], "cannot write to"),
        (["photos", "out", "--size", "3"], "16 to 1024"),
        (["sheet", "nowhere", "out.png"], "there is no nowhere"),
    ],
)
def test_mistakes_are_one_line_and_status_2(tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "file").touch()
    status, said, error = gptface("faces", *[word.replace("{file}", str(tmp_path / "file")) for word in arguments])
    assert (status, said) == (2, "")
    assert message in error
    assert error.count("\n") == 1
