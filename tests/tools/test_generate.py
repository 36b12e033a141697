"""`gptface generate`, `edit`, `caption`, `score` as a user runs them."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gptface_dist import release
from gptface_dist.config import options
from gptface_dist.generation import Generator, Gradient, Guidance, Sampling
from gptface_dist.generation.options import GenerationOptions
from tests.program import gptface
from tests.release.factories import make_model, make_tokenizers


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("release")
    vocabulary = make_tokenizers(made / "tokenizers")
    release.save(make_model(vocabulary), made / "tokenizers", made / "release", (4, 4))
    return made / "release"


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
    for command in (("generate", folder, out, "--text", "a"), (*edit, image, "--region", "hair"), ("caption", folder, image)):
        assert "sampling.steps must be at least 1, not 0" in refused(*command, "sampling.steps=0")
        assert "override 'guidance.rerank=two': Value 'two'" in refused(*command, "guidance.rerank=two")
        unknown = refused(*command, "guidance.reranking=2")
        assert "override 'guidance.reranking=2': Key 'reranking' not in 'Guidance'. Did you mean: 'rerank'?" in unknown
        assert all(option.key in unknown for option in options(GenerationOptions()))
        assert "override 'hat' is not of the form key=value (keys: sampling.steps," in refused(*command, "hat")
        for flag in ("--seed", "--steps", "--temperature", "--top-k", "--classifier-free", "--gradient", "--rerank"):
            status, said, error = gptface(*command, flag, "1")
            assert (status, said) == (2, "")
            assert f"No such option: {flag}" in error
    assert "classifier-free guidance draws pictures" in refused("caption", folder, image, "guidance.classifier_free=1")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.png", "face.png", "wide.png"]


def test_overrides_are_the_options_of_the_same_names(folder: Path, tmp_path: Path) -> None:
    """Each command against the library, from the command's own defaults or the preset's."""
    generator, out = Generator.from_pretrained(folder), tmp_path / "out.png"

    def pixels(*arguments: str | Path) -> np.ndarray:
        status, _, error = gptface(*arguments)
        assert (status, error) == (0, "")
        with Image.open(out) as opened:
            return np.asarray(opened)

    changed = ("sampling.seed=3", "sampling.steps=2", "guidance.rerank=2", "guidance.gradient.strength=0.5")
    guidance = Guidance(Gradient(strength=0.5), rerank=2)
    drawn = generator.generate("a face", 1, Sampling(steps=2, seed=3), guidance)[0]
    assert (pixels("generate", folder, out, "--text", "a face", *changed) == drawn.pixels).all()

    face = tmp_path / "face.png"
    drawn.image.save(face)
    edit = ("edit", folder, out, "--image", face, "--text", "a hat", "--region", "0,0,8,6")
    edited = generator.edit(drawn.pixels, "a hat", "0,0,8,6", guidance=Guidance(classifier_free=2.0, rerank=1))[0]
    assert (pixels(*edit, "guidance.rerank=1") == edited.pixels).all()
    sampling = Sampling(temperature=0.7, seed=5)
    edited = generator.edit(drawn.pixels, "a hat", "0,0,8,6", "inpainting", sampling=sampling)[0]
    assert (pixels(*edit, "--task", "inpainting", "sampling.seed=5") == edited.pixels).all()

    (caption,) = generator.caption(drawn.pixels, 1, Sampling(temperature=0.5, steps=3))
    assert gptface("caption", folder, face, "sampling.steps=3")[1] == f"{caption.match:.3f}  {caption.text}\n"


def test_options_are_listed_at_once() -> None:
    """With the defaults of each command, and without the libraries that take seconds to import."""
    code = """
import sys
sys.modules["torch"] = sys.modules["diffusers"] = None
from gptface_dist.tools import main
sys.argv = ["gptface", sys.argv[1], "--options"]
main.run()
"""
    said = {}
    for command in ("generate", "edit", "caption"):
        done = subprocess.run([sys.executable, "-c", code, command], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        said[command] = done.stdout.splitlines()
    for command, temperature in (("generate", 1.0), ("edit", 1.0), ("caption", 0.5)):
        for option in options(GenerationOptions(Sampling(temperature=temperature))):
            at = said[command].index(f"{option.key}={option.value}")
            assert said[command][at + 1] == f"    {option.meaning}"
    assert "--task inpainting: sampling.temperature=0.7" in said["edit"]
    assert "--task occluder: guidance.classifier_free=1.0 guidance.rerank=2" in said["edit"]
