"""Load a release: the plain model and its tokenizers. Needs only torch, safetensors, sentencepiece and diffusers."""

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
    """A loaded release; its tokenizers are loaded when first used."""

    path: Path
    """Folder of the release."""
    config: ReleaseConfig
    """Content of ``config.json``."""
    model: Transformer
    """The plain model, in evaluation mode."""

    @property
    def vocabulary(self) -> Vocabulary:
        """The joint ids."""
        return self.config.vocabulary

    @cached_property
    def text(self) -> TextTokenizer:
        """The text tokenizer, loaded at first use."""
        return TextTokenizer.load(self.path / TOKENIZERS_NAME / TEXT_NAME)

    @cached_property
    def image(self) -> "ImageTokenizer":
        """The image tokenizer, loaded at first use on the model's device."""
        # diffusers takes seconds to import, which users of the model alone do not need.
        from gptface_dist.tokenizers.image import ImageTokenizer

        device = next(self.model.parameters()).device
        return ImageTokenizer.load(self.path / TOKENIZERS_NAME / IMAGE_NAME, device)


def load(
    path: Path | str, dtype: torch.dtype | None = None, device: torch.device | str = "cpu", verify: bool = True
) -> Release:
    """Load a release.

    Args:
        path: folder of the release.
        dtype: dtype of the model's weights; as stored by default.
        device: device of the model.
        verify: compare the hashes of all loaded files with the manifest; takes about as long as loading them.

    :class:`UserError` where the folder is no release, lacks a file, or a file is damaged or of another release.
    """
    folder = Path(path)
    config = ReleaseConfig.load(folder)
    known = manifest.read(folder)
    weights = Weights(folder)
    if verify:
        tokenizers = [name for name in known if name.startswith(f"{TOKENIZERS_NAME}/")]
        for problem in manifest.problems(folder, known, [CONFIG_NAME, *tokenizers, *weights.files]):
            raise UserError(f"{problem}; get the release again")
    tokenizers_of = Vocabulary.load(folder / TOKENIZERS_NAME / VOCABULARY_NAME)
    if tokenizers_of != config.vocabulary:
        raise UserError(f"{folder / TOKENIZERS_NAME} are not the tokenizers {CONFIG_NAME} names: get the release again")
    return Release(folder, config, load_model(folder, config, dtype, device))


def load_model(
    folder: Path, config: ReleaseConfig, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> Transformer:
    """Load the plain model of a release, in evaluation mode, without verification against the manifest."""
    weights = Weights(folder)
    dtype = dtype or DTYPES[config.dtype]
    check_table(weights, config.shapes, f"{folder}")
    with torch.device("meta"):
        model = config.build_objective().model(config.options, config.vocabulary)
    loaded = {}
    for name, shape in config.shapes.items():
        if weights.shapes[name] != shape:
            raise UserError(f"{folder}: {name} has the shape {weights.shapes[name]}, {CONFIG_NAME} wants {shape}: get it again")
        # A copy: memory mapped from the file would change with it, or end the process when the file is truncated.
        loaded[name] = weights[name].to(device, dtype, copy=True)
    model.load_state_dict(loaded, assign=True)
    return model.eval()


def weights(path: Path | str) -> Weights:
    """A release's tensors by name, each read at access; names are checked against its configuration.

    :class:`UserError` where the folder is no release or its files are incomplete; hashes are not compared.
    """
    folder = Path(path)
    config = ReleaseConfig.load(folder)
    tensors = Weights(folder)
    check_table(tensors, config.shapes, f"{folder}")
    return tensors
