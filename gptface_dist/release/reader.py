"""Reading a release: the plain model and its tokenizers. Needs torch, safetensors, sentencepiece and diffusers, no more."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from gptface_dist.errors import UserError
from gptface_dist.model.plain import Transformer
from gptface_dist.release import manifest
from gptface_dist.release.config import CONFIG_NAME, DTYPES, ReleaseConfig
from gptface_dist.release.tensors import Weights, check_table
from gptface_dist.tokenizers.text import TextTokenizer
from gptface_dist.tokenizers.vocabulary import IMAGE_NAME, TEXT_NAME, VOCABULARY_NAME, Vocabulary

TOKENIZERS_NAME = "tokenizers"

if TYPE_CHECKING:
    from gptface_dist.tokenizers.image import ImageTokenizer


@dataclass(frozen=True)
class Release:
    """A release, loaded."""

    path: Path
    """Its folder."""
    config: ReleaseConfig
    """What it says of itself."""
    model: Transformer
    """The model, in evaluation mode."""

    @property
    def vocabulary(self) -> Vocabulary:
        """The joint ids."""
        return self.config.vocabulary

    @cached_property
    def text(self) -> TextTokenizer:
        """The text tokenizer."""
        return TextTokenizer.load(self.path / TOKENIZERS_NAME / TEXT_NAME)

    @cached_property
    def image(self) -> "ImageTokenizer":
        """The image tokenizer, on the model's device."""
        # diffusers takes seconds to import; not everyone who loads a model makes pictures.
        from gptface_dist.tokenizers.image import ImageTokenizer

        device = next(self.model.parameters()).device
        return ImageTokenizer.load(self.path / TOKENIZERS_NAME / IMAGE_NAME, device)


def load(
    path: Path | str, dtype: torch.dtype | None = None, device: torch.device | str = "cpu", verify: bool = True
) -> Release:
    """Read a release.

    Args:
        path: its folder.
        dtype: of the model's weights; as stored by default.
        device: where the model goes.
        verify: compare the hashes of all files that are read with the manifest; takes about as long as reading them.

    :class:`UserError` in one line where the folder is no release, lacks a file, or a file is damaged or another's.
    """
    folder = Path(path)
    config = ReleaseConfig.load(folder)
    known = manifest.read(folder)
    held = Weights(folder)
    if verify:
        tokenizers = [name for name in known if name.startswith(f"{TOKENIZERS_NAME}/")]
        for problem in manifest.problems(folder, known, [CONFIG_NAME, *tokenizers, *held.files]):
            raise UserError(f"{problem}; get the release again")
    tokenizers_of = Vocabulary.load(folder / TOKENIZERS_NAME / VOCABULARY_NAME)
    if tokenizers_of != config.vocabulary:
        raise UserError(f"{folder / TOKENIZERS_NAME} are not the tokenizers {CONFIG_NAME} names: get the release again")
    return Release(folder, config, load_model(folder, config, dtype, device))


def load_model(
    folder: Path, config: ReleaseConfig, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> Transformer:
    """The plain model of a release, without a look at the manifest."""
    held = Weights(folder)
    dtype = dtype or DTYPES[config.dtype]
    check_table(held, config.shapes, f"{folder}")
    with torch.device("meta"):
        model = config.build_objective().model(config.options, config.vocabulary)
    loaded = {}
    for name, shape in config.shapes.items():
        if held.shapes[name] != shape:
            raise UserError(f"{folder}: {name} has the shape {held.shapes[name]}, {CONFIG_NAME} wants {shape}: get it again")
        # A copy: what is mapped from the file would change, or end the process, when the file does.
        loaded[name] = held[name].to(device, dtype, copy=True)
    model.load_state_dict(loaded, assign=True)
    return model.eval()


def weights(path: Path | str) -> Weights:
    """A release's tensors by name, each read when asked for; names and shapes are checked against its configuration.

    :class:`UserError` where the folder is no release or its files are not whole; hashes are not compared.
    """
    folder = Path(path)
    config = ReleaseConfig.load(folder)
    held = Weights(folder)
    check_table(held, config.shapes, f"{folder}")
    return held
