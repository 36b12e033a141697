"""The generator: edits keep what they must, captions, scores, and mistakes."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gptface_dist import release
from gptface_dist.errors import UserError
from gptface_dist.generation import Generator, Guidance, Sampling
from gptface_dist.generation.pictures import Picture
from gptface_dist.generation.presets import TASKS

ONCE = Sampling(steps=2)
TEXT = "a face hair"


def picture(seed: int, size: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3)).astype(np.uint8)


def test_a_thousand_edits_keep_tokens_and_pixels_outside(generator: Generator) -> None:
    rng = np.random.default_rng(0)
    before = generator.read_picture(picture(1))
    redrawn = 0
    for number in range(1000):
        left, top = rng.integers(0, 8, 2)
        where = np.zeros((8, 8), dtype=bool)
        where[top : top + rng.integers(1, 8), left : left + rng.integers(1, 8)] = True
        sampling = Sampling(steps=1, seed=number)
        after = generator.edit(before, TEXT, where, sampling=sampling, guidance=Guidance(), feather=int(rng.integers(0, 3)))[0]
        tokens = where.reshape(4, 2, 4, 2).any(axis=(1, 3))
        assert (after.codes[~tokens] == before.codes[~tokens]).all()
        assert (after.pixels[~where] == before.pixels[~where]).all()
        redrawn += int((after.codes[tokens] != before.codes[tokens]).sum())
        # Ten edits in a row each, then from the start again.
        before = after if number % 10 else generator.read_picture(picture(number))
    assert redrawn > 1000, "inside, tokens are drawn anew"


def test_one_edit_after_the_other(generator: Generator) -> None:
    """Tokens of the first edit are still there after the second: pixels are not encoded anew in between."""
    upper, lower = (np.zeros((8, 8), dtype=bool) for _ in range(2))
    upper[:4], lower[6:] = True, True
    first = generator.edit(picture(3), TEXT, upper, guidance=Guidance(), sampling=ONCE)[0]
    second = generator.edit(first, "a hat", lower, guidance=Guidance(), sampling=ONCE)[0]
    assert (second.codes[:3] == first.codes[:3]).all()
    assert (second.pixels[:6] == first.pixels[:6]).all()
    assert (second.pixels[4:6] == picture(3)[4:6]).all()


def test_editing_everything_without_visible_tokens_is_generating(generator: Generator) -> None:
    everything = np.ones((8, 8), dtype=bool)
    edited = generator.edit(picture(5), TEXT, everything, n=2, sampling=ONCE, guidance=Guidance(), feather=0)
    drawn = generator.generate(TEXT, 2, ONCE)
    for edit, generated in zip(edited, drawn, strict=True):
        assert (edit.codes == generated.codes).all()
        assert (edit.pixels == generated.pixels).all()


def test_presets_run_and_say_what_they_need(generator: Generator) -> None:
    for name, preset in TASKS.items():
        where = None if preset.region else "0,0,4,4"
        text = TEXT if preset.text_needed else ""
        assert generator.edit(picture(1), text, where, name, sampling=ONCE)[0].codes.shape == (4, 4)
    with pytest.raises(UserError, match="the task attribute needs a region"):
        generator.edit(picture(1), TEXT)
    with pytest.raises(UserError, match="text is empty"):
        generator.edit(picture(1), " ", "hair")
    with pytest.raises(UserError, match="no task 'beautify'"):
        generator.edit(picture(1), TEXT, "hair", "beautify")


def test_codes_of_a_picture_are_those_of_the_tokenizer(generator: Generator, tmp_path: Path) -> None:
    pixels = picture(2)
    read = generator.read_picture(pixels)
    assert (read.pixels == pixels).all()
    Image.fromarray(pixels).save(tmp_path / "p.png")
    for source in (tmp_path / "p.png", str(tmp_path / "p.png"), Image.fromarray(pixels)):
        assert (generator.read_picture(source).codes == read.codes).all()
    assert generator.read_picture(read) is read
    assert generator.read_picture(picture(2, 20)).pixels.shape == (8, 8, 3)


def test_reconstructions_do_not_depend_on_each_other(generator: Generator) -> None:
    pictures = [picture(number) for number in range(3)]
    together = generator.reconstruct(pictures)
    for pixels, rebuilt in zip(pictures, together, strict=True):
        codes = torch.from_numpy(generator.read_picture(pixels).codes)
        decoded = (generator._image.decode(codes[None])[0].permute(1, 2, 0) + 1) * 127.5
        assert (rebuilt == decoded.round().to(torch.uint8).numpy()).all()
        assert (generator.reconstruct([pixels])[0] == rebuilt).all()


def test_captions_are_texts_the_best_first(generator: Generator) -> None:
    captions = generator.caption(picture(2), 5, lengths=[3, 5])
    assert 1 <= len(captions) <= 5
    assert [c.match for c in captions] == sorted((c.match for c in captions), reverse=True)
    assert len({c.text for c in captions}) == len(captions)
    assert captions == generator.caption(picture(2), 5, lengths=[3, 5])


def test_score_is_a_probability_of_the_pair(generator: Generator) -> None:
    scores = [generator.score(picture(seed), text) for seed in (1, 2) for text in ("a face", "a hat")]
    assert all(0 < score < 1 for score in scores)
    assert len(set(scores)) == 4


def test_mistakes_are_named(generator: Generator, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the text is empty"):
        generator.generate("  ")
    with pytest.raises(UserError, match=r"the text has \d+ tokens, the model takes 64"):
        generator.generate("z" * 80)
    with pytest.raises(UserError, match="at least 1 picture"):
        generator.generate(TEXT, 0)
    with pytest.raises(UserError, match="has 20x20 pixels, the model's pictures 8x8"):
        generator.edit(picture(0, 20), TEXT, "0,0,4,4")
    assert generator.edit(picture(0, 20), TEXT, "0,0,4,4", sampling=ONCE, resize=True)[0].pixels.shape == (8, 8, 3)
    with pytest.raises(UserError, match=r"the region must be bool \[8, 8\] and not empty"):
        generator.edit(picture(0), TEXT, np.zeros((8, 8), dtype=bool))
    with pytest.raises(UserError, match="captions have 1 to 64 tokens"):
        generator.caption(picture(0), lengths=[65])
    (tmp_path / "no.png").write_text("no")
    with pytest.raises(UserError, match="unreadable picture"):
        generator.score(tmp_path / "no.png", TEXT)
    with pytest.raises(UserError, match="cannot be read"):
        generator.score(tmp_path / "missing.png", TEXT)


def test_what_training_did_not_have_is_refused(release_folder: Path) -> None:
    loaded = release.load(release_folder)
    data = {"batch": {"text_length": 12}, "masking": {"text_dropout": 0.0}}
    card = replace(loaded.config.card, config={"data": data})
    limited = Generator.from_release(replace(loaded, config=replace(loaded.config, card=card)))
    assert limited.longest_text == 12
    with pytest.raises(UserError, match="the model takes 12"):
        limited.generate("z" * 20)
    with pytest.raises(UserError, match=r"text_dropout=0.*cannot be guided classifier-free"):
        limited.generate(TEXT, guidance=Guidance(classifier_free=1.0))
    with pytest.raises(UserError, match="cannot be guided classifier-free"):
        limited.check_guidance(Guidance(classifier_free=0.1))
    limited.check_guidance(Guidance(rerank=2))
    assert len(limited.generate("a", sampling=ONCE)) == 1


def test_tokenizers_of_another_model_are_refused(generator: Generator) -> None:
    class Other:
        sha256 = "0" * 64
        factor = 2

    with pytest.raises(UserError, match="trained with image tokenizer"):
        Generator(generator.model, generator._text, Other(), (4, 4))  # type: ignore[arg-type]


def test_pictures_carry_what_they_were_drawn_for(generator: Generator) -> None:
    drawn = generator.generate([TEXT, "a hat"], 2)
    assert [p.text for p in drawn] == [TEXT, TEXT, "a hat", "a hat"]
    assert all(isinstance(p, Picture) and p.image.size == (8, 8) and p.match is not None for p in drawn)


def test_runs_where_nothing_distributed_is_installed(release_folder: Path) -> None:
    code = (
        "import sys\n"
        "for name in ('deepspeed', 'megatron', 'megatron.core', 'triton', 'webdataset', 'anny'): sys.modules[name] = None\n"
        "from gptface_dist.generation import Generator\n"
        f"print(len(Generator.from_pretrained({str(release_folder)!r}).generate('a hat', n=2)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "2\n"), done.stderr
