"""The page of a run."""

import base64
import json
from pathlib import Path

import pytest
from PIL import Image

from gptface_dist.errors import UserError
from gptface_dist.training.analysis.report import Section, write
from gptface_dist.training.metrics import NAME


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    train = [{"step": s, "kind": "train", "loss/text": 4 / s, "loss/image": 1.0, "tokens": 100, "seconds": 2.0} for s in (1, 2)]
    last = {"step": 2, "kind": "evaluation", "loss/text": 1.5, "accuracy/text": 0.25, "constant_guess/text": 3.25}
    (folder / NAME).write_text("".join(json.dumps(record) + "\n" for record in [*train, last]))
    return folder


def test_everything_is_inside_the_page(run: Path, tmp_path: Path) -> None:
    Image.new("RGB", (3, 2), (1, 2, 3)).save(tmp_path / "face.png")
    (tmp_path / "captions.txt").write_text("a <smiling> man")
    write(
        tmp_path / "page.html",
        "A & B",
        run,
        [Section.parse(f"Faces={tmp_path / 'face.png'}"), Section("C", tmp_path / "captions.txt")],
    )
    page = (tmp_path / "page.html").read_text()
    assert base64.b64encode((tmp_path / "face.png").read_bytes()).decode() in page
    assert "a &lt;smiling&gt; man" in page
    assert "A &amp; B" in page
    assert "2 steps, 200 tokens, 50 tokens/s" in page
    assert "<td>text<td>1.500<td>3.250<td>25.0%" in page
    assert "http" not in page
    assert f'alt="face.png" width="{640 // 3 * 3}" class="enlarged"' in page, "a small picture is enlarged, by whole pixels"
    Image.new("RGB", (700, 2)).save(tmp_path / "wide.png")
    write(tmp_path / "page.html", "x", run, [Section("Wide", tmp_path / "wide.png")])
    assert 'width="700" src' in (tmp_path / "page.html").read_text()


def test_a_missing_picture_leaves_no_page(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"face\.png"):
        write(tmp_path / "page.html", "x", run, [Section("Faces", tmp_path / "face.png")])
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(UserError, match=r"text\.png is no picture"):
        write(tmp_path / "page.html", "x", run, [Section("Faces", tmp_path / "text.png")])
    assert not (tmp_path / "page.html").exists()
    with pytest.raises(UserError, match="TITLE=PATH"):
        Section.parse("faces.png")
