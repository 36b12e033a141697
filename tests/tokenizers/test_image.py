"""The image tokenizer against diffusers' own forward pass, alone and in batches, and folders that hold something else."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import VQModel
from safetensors.torch import load_file, save_file

from gptface_dist.errors import UserError
from gptface_dist.tokenizers.image import ImageTokenizer
from gptface_dist.tokenizers.image_files import CONFIG_NAME, WEIGHTS_NAME, image_sha256
from tests.vqmodels import small_model

VARIANTS: list[dict[str, Any]] = [
    {},
    {"norm_type": "spatial", "block_out_channels": (32, 32)},
    {"lookup_from_codebook": True},
    {"force_upcast": True, "scaling_factor": 0.5, "latent_channels": 8},
    {
        "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        "mid_block_add_attention": False,
    },
]


def tokenizer(folder: Path, **config: Any) -> ImageTokenizer:
    small_model(**config).save_pretrained(folder)
    return ImageTokenizer.load(folder)


def pictures(count: int, height: int = 8, width: int = 8) -> torch.Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(count)) * 2 - 1


@pytest.mark.parametrize("config", VARIANTS, ids=["plain", "spatial", "lookup", "others", "attention"])
def test_codes_and_pixels_are_those_of_diffusers(tmp_path: Path, config: dict[str, Any]) -> None:
    ours = tokenizer(tmp_path, **config)
    theirs = VQModel.from_pretrained(tmp_path).eval()
    pixels = pictures(3, 8, 12)
    with torch.no_grad():
        latents = theirs.encode(pixels).latents
        _, _, (_, _, indices) = theirs.quantize(latents)
        if theirs.config.lookup_from_codebook:
            expected = theirs.decode(indices.view(3, 4, 6), force_not_quantize=True, shape=(3, 4, 6, 4)).sample
        else:
            expected = theirs.decode(latents).sample
    codes = ours.encode(pixels)
    assert (codes.dtype, tuple(codes.shape)) == (torch.int64, (3, 4, 6))
    assert len(codes.unique()) > 2, "the test would see nothing"
    assert torch.equal(codes, indices.view(3, 4, 6))
    found = ours.decode(codes)
    assert (found.dtype, tuple(found.shape)) == (torch.float32, (3, 3, 8, 12))
    torch.testing.assert_close(found, expected.clamp(-1, 1), atol=2e-5, rtol=0)


def test_a_picture_has_the_same_codes_alone_and_in_any_batch(tmp_path: Path) -> None:
    made = tokenizer(tmp_path, codes=512)
    pixels = pictures(9, 16, 16)
    together = made.encode(pixels)
    alone = torch.cat([made.encode(picture[None]) for picture in pixels])
    assert torch.equal(together, alone)
    shuffled = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    assert torch.equal(made.encode(pixels[shuffled]), together[shuffled])
    assert torch.equal(made.encode(torch.cat([pixels, pictures(4, 16, 16)]))[:9], together)


def test_no_pictures_and_no_codes(tmp_path: Path) -> None:
    made = tokenizer(tmp_path)
    assert tuple(made.encode(pictures(0)).shape) == (0, 4, 4)
    assert tuple(made.decode(torch.zeros(0, 4, 4, dtype=torch.int64)).shape) == (0, 3, 8, 8)


@pytest.mark.parametrize("shape", [(8, 7), (9, 8), (0, 8)])
def test_sizes_that_do_not_divide(tmp_path: Path, shape: tuple[int, int]) -> None:
    with pytest.raises(UserError, match="do not divide into 2x2 patches"):
        tokenizer(tmp_path).encode(pictures(1, *shape))


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "must be float32"),
        (torch.zeros(3, 8, 8), "must be float32"),
        (torch.zeros(1, 1, 8, 8), "must be float32"),
        (torch.full((1, 3, 8, 8), 255.0), "within"),
        (torch.full((1, 3, 8, 8), float("nan")), "within"),
    ],
)
def test_what_are_no_pixels(tmp_path: Path, pixels: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tokenizer(tmp_path).encode(pixels)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.full((1, 4, 4), 16), "within 0 and 15, not 16 to 16"),
        (torch.full((1, 4, 4), -1), "within 0 and 15"),
        (torch.zeros(4, 4, dtype=torch.int64), "must be integers"),
        (torch.zeros(1, 4, 4), "must be integers"),
    ],
)
def test_what_are_no_codes(tmp_path: Path, codes: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tokenizer(tmp_path).decode(codes)


def test_what_is_saved_is_what_was_loaded(tmp_path: Path) -> None:
    made = tokenizer(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "notes.txt").write_text("mine")
    made.save(tmp_path / "b")
    assert sorted(file.name for file in (tmp_path / "b").iterdir()) == sorted([CONFIG_NAME, WEIGHTS_NAME, "notes.txt"])
    copy = ImageTokenizer.load(tmp_path / "b")
    assert copy.sha256 == made.sha256 == image_sha256(tmp_path / "a") == image_sha256(tmp_path / "b")
    assert torch.equal(copy.encode(pictures(2)), made.encode(pictures(2)))
    assert (copy.codes, copy.factor) == (16, 2)


def test_half_precision_weights_compute_in_float32(tmp_path: Path) -> None:
    small_model().half().save_pretrained(tmp_path)
    made = ImageTokenizer.load(tmp_path)
    assert made.decode(made.encode(pictures(1))).dtype == torch.float32


def damaged(folder: Path, kind: str) -> None:
    """Damage the folder of a good tokenizer."""
    config, weights = folder / CONFIG_NAME, folder / WEIGHTS_NAME
    raw = json.loads(config.read_text())
    if kind == "no configuration":
        config.unlink()
    elif kind == "configuration cut":
        config.write_text(config.read_text()[:50])
    elif kind == "configuration a list":
        config.write_text("[]")
    elif kind == "another model":
        config.write_text(json.dumps({**raw, "_class_name": "AutoencoderKL"}))
    elif kind == "unknown block":
        config.write_text(json.dumps({**raw, "down_block_types": ["No", "No"]}))
    elif kind == "other shapes":
        config.write_text(json.dumps({**raw, "block_out_channels": [8, 16]}))
    elif kind == "grey":
        small_model(in_channels=1, out_channels=1).save_pretrained(folder)
    elif kind == "pickled":
        weights.rename(folder / "diffusion_pytorch_model.bin")
    elif kind == "weights cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif kind == "weights no safetensors":
        weights.write_bytes(b"no weights")
    else:
        tensors = load_file(weights)
        del tensors["quantize.embedding.weight"]
        save_file(tensors, weights)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no configuration", "holds no config.json"),
        ("configuration cut", "is no configuration"),
        ("configuration a list", "is no configuration"),
        ("another model", "describes a AutoencoderKL, not a VQModel"),
        ("unknown block", "cannot be read as a VQModel"),
        ("other shapes", "cannot be read as a VQModel"),
        ("grey", "pictures of 1 channels: RGB is needed"),
        ("pickled", "pickled weights are not read"),
        ("weights cut", "cannot be read as a VQModel"),
        ("weights no safetensors", "cannot be read as a VQModel"),
        ("a tensor missing", "1 tensors differ, first quantize.embedding.weight"),
    ],
)
def test_a_folder_that_holds_something_else(tmp_path: Path, capfd: pytest.CaptureFixture[str], kind: str, message: str) -> None:
    small_model().save_pretrained(tmp_path)
    damaged(tmp_path, kind)
    logging.getLogger("diffusers").setLevel(logging.WARNING)
    with pytest.raises(UserError, match=message) as caught:
        ImageTokenizer.load(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert capfd.readouterr().err == "", "one line, and nobody else's"
