"""Small releases for tests."""

import dataclasses
from pathlib import Path

import torch

from gptface_dist.model.names import initialise
from gptface_dist.model.options import ModelOptions
from gptface_dist.model.plain import GPTFace
from gptface_dist.tokenizers.image import save_model
from gptface_dist.tokenizers.text import TextOptions, train_text_tokenizer
from gptface_dist.tokenizers.vocabulary import Vocabulary, join
from tests.vqmodels import small_model

GRID = (3, 4)
OPTIONS = ModelOptions(layers=2, hidden=16, heads=4, ffn=24, text_positions=19, rows=4, columns=4, init_std=0.3)
VARIANTS = {
    "gelu": OPTIONS,
    "swiglu": dataclasses.replace(OPTIONS, activation="swiglu"),
    "qk_norm": dataclasses.replace(OPTIONS, qk_norm=True),
}


def make_tokenizers(folder: Path, seed: int = 0) -> Vocabulary:
    """A folder of two small tokenizers."""
    words = [
        f"a face with {colour} hair and {thing} number {seed}"
        for colour in ("black", "brown")
        for thing in ("a hat", "glasses")
    ]
    train_text_tokenizer(words, folder / "text.model", TextOptions(size=280, character_coverage=1.0))
    save_model(small_model(seed=seed), folder / "image")
    return join(folder)


def make_model(vocabulary: Vocabulary, options: ModelOptions = OPTIONS, seed: int = 0) -> GPTFace:
    """A model none of whose parameters is without effect: no norm is 1, no bias 0."""
    model = GPTFace(options, vocabulary)
    initialise(model, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()
