"""`gptface generate`, `edit`, `caption`, `score` as a user runs them."""

import contextlib
import io
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gptface_dist import release
from gptface_dist.tools import main
from tests.release.factories import make_model, make_tokenizers


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("release")
    vocabulary = make_tokenizers(made / "tokenizers")
    release.save(make_model(vocabulary), made / "tokenizers", made / "release", (4, 4))
    return made / "release"


def gptface(*arguments: str | Path) -> tuple[int, str, str]:
    """The program in this process: status, stdout, stderr."""
    out, error = io.StringIO(), io.StringIO()
    before, sys.argv = sys.argv, ["gptface", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
            main.run()
        status = 0
    except SystemExit as end:
        status = int(end.code or 0)
    finally:
        sys.argv = before
    return status, out.getvalue(), error.getvalue()


def refused(*arguments: str | Path) -> str:
    status, out, error = gptface(*arguments)
    assert (status, out) == (2, "")
    assert error.count("\n") == 1
    assert "Traceback" not in error
    return error


def test_generate_edit_caption_score(folder: Path, tmp_path: Path) -> None:
    faces, edited, strip = tmp_path / "faces.png", tmp_path / "edited.png", tmp_path / "strip.png"
    status, said, error = gptface("generate", folder, faces, "--text", "a face", "--text", "a hat", "-n", "3")
    assert (status, error) == (0, "")
    assert said.splitlines()[0].startswith("a face p(match) 0.")
    assert said.endswith(f"6 of 8x8 pixels in {faces}\n")
    with Image.open(faces) as opened:
        assert opened.size == (3 * 10 - 2, 2 * 10 - 2)
        face = opened.convert("RGB").crop((0, 0, 8, 8))
    again = tmp_path / "again.png"
    gptface("generate", folder, again, "--text", "a face", "--text", "a hat", "-n", "3")
    assert again.read_bytes() == faces.read_bytes()

    face.save(tmp_path / "face.png")
    edits = ["--text", "a hat", "--region", "0,0,8,3", "--text", "glasses", "--region", "0,6,4,8"]
    status, said, error = gptface("edit", folder, edited, "--image", tmp_path / "face.png", *edits, "--strip", strip)
    assert (status, error) == (0, "")
    assert [line[:2] for line in said.splitlines()] == ["1:", "2:", "8x"]
    with Image.open(edited) as opened:
        assert (np.asarray(opened)[3:6] == np.asarray(face)[3:6]).all()
    with Image.open(strip) as opened:
        assert opened.size == (28, 8)

    status, said, error = gptface("caption", folder, tmp_path / "face.png", "-n", "2")
    assert (status, error) == (0, "")
    assert 0 < float(said.split()[0]) < 1
    status, said, error = gptface("score", folder, tmp_path / "face.png", "a face")
    assert (status, error) == (0, "")
    assert 0 < float(said) < 1


def test_mistakes_are_one_line_and_nothing_is_written(folder: Path, tmp_path: Path) -> None:
    out, image = tmp_path / "out.png", tmp_path / "face.png"
    Image.new("RGB", (8, 8)).save(image)
    (tmp_path / "broken.png").write_bytes(b"nothing")
    Image.new("RGB", (9, 8)).save(tmp_path / "wide.png")
    edit = ("edit", folder, out, "--image")
    assert "is empty" in refused("generate", folder, out, "--text", " ")
    assert "the model takes 16" in refused("generate", folder, out, "--text", "q" * 60)
    assert "pictures are written as" in refused("generate", folder, tmp_path / "out.txt", "--text", "a")
    assert "no folder" in refused("generate", folder, tmp_path / "no" / "out.png", "--text", "a")
    assert "gptface convert" in refused("generate", tmp_path / "nothing", out, "--text", "a")
    assert "steps" in refused("generate", folder, out, "--text", "a", "--steps", "0")
    assert "no device" in refused("generate", folder, out, "--text", "a", "--device", "tpu")
    assert "unreadable" in refused(*edit, tmp_path / "broken.png", "--text", "a", "--region", "hair")
    assert "9x8 pixels" in refused(*edit, tmp_path / "wide.png", "--text", "a", "--region", "hair")
    assert "no box inside" in refused(*edit, image, "--text", "a", "--region", "0,0,9,9")
    assert "needs a --region" in refused(*edit, image, "--text", "a")
    assert "the text is empty" in refused(*edit, image, "--region", "hair")
    assert "no task" in refused(*edit, image, "--text", "a", "--task", "x")
    two = ("--text", "a", "--text", "b", "--text", "c", "--region", "hair", "--region", "lips")
    assert "3 texts and 2 regions" in refused(*edit, image, *two)
    assert "cannot be read" in refused("caption", folder, tmp_path / "gone.png")
    assert "is empty" in refused("score", folder, image, "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.png", "face.png", "wide.png"]
