"""Writing a release: beside its final place first, then given its name; nothing is left where anything fails."""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from gptface_dist.errors import UserError
from gptface_dist.files import fsync, write_atomically
from gptface_dist.model.plain import Transformer
from gptface_dist.model.reference_batch import reference_batch
from gptface_dist.objectives.reference_outputs import REFERENCE_NAME, ReferenceOutputs, reference_outputs
from gptface_dist.objectives.registry import ObjectiveOptions
from gptface_dist.release import card as cards
from gptface_dist.release import manifest, tensors
from gptface_dist.release.card import Card
from gptface_dist.release.config import CONFIG_NAME, DTYPES, ReleaseConfig, dtype_name
from gptface_dist.release.reader import TOKENIZERS_NAME, load_model
from gptface_dist.sequence import SPECIALS_PER_SEQUENCE
from gptface_dist.tokenizers import vocabulary as vocabularies
from gptface_dist.tokenizers.image_files import CONFIG_NAME as IMAGE_CONFIG_NAME
from gptface_dist.tokenizers.image_files import weights_path
from gptface_dist.tokenizers.vocabulary import IMAGE_NAME, TEXT_NAME, VOCABULARY_NAME

CARD_NAME = "README.md"


def save(
    model: Transformer,
    tokenizers: Path,
    path: Path,
    grid: tuple[int, int],
    card: Card = Card(),  # noqa: B008 (frozen)
    dtype: torch.dtype = torch.float32,
    shard_bytes: int = tensors.SHARD_BYTES,
    objective: ObjectiveOptions = ObjectiveOptions(),  # noqa: B008 (frozen)
) -> None:
    """Write a model as a release: the folder ``path`` appears whole or not at all.

    Args:
        model: what is released; its parameters may lie anywhere.
        tokenizers: folder with the ``text.model``, ``image/`` and ``vocabulary.json`` that the model was trained with.
        path: folder to make; must not exist.
        grid: rows and columns of image codes that it was trained on.
        card: where it comes from.
        dtype: float32 or bfloat16.
        shard_bytes: largest file of weights, unless one tensor alone is larger.
        objective: what the model is for.

    :class:`UserError` where the path exists or the tokenizers are not the model's.
    """
    config = ReleaseConfig(objective, model.options, model.vocabulary, grid, dtype_name(dtype), card)
    with publishing(path) as folder:
        hashes = write_model(folder, config, tokenizers, dict(model.named_parameters()), shard_bytes)
        batch = reference_batch(model.vocabulary, grid, model.options.text_positions - SPECIALS_PER_SEQUENCE)
        # The outputs of what was written and read back, not of what lies in memory.
        outputs = reference_outputs(config.build_objective(), load_model(folder, config, dtype=torch.float32), batch)
        ReferenceOutputs(batch, outputs, "float32").save(folder / REFERENCE_NAME)
        finish(folder, config, hashes)


@contextmanager
def publishing(path: Path) -> Iterator[Path]:
    """A folder beside ``path`` to write into: renamed to ``path`` at the end, removed where anything goes wrong."""
    if path.exists():
        raise UserError(f"{path} exists: remove it or give another name")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for written in [temporary, *temporary.rglob("*")]:
            fsync(written)
        temporary.rename(path)
        fsync(path.parent)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_model(
    folder: Path,
    config: ReleaseConfig,
    tokenizers: Path,
    held: Mapping[str, Tensor],
    shard_bytes: int,
    done: Callable[[int], None] = lambda values: None,
) -> dict[str, str]:
    """Tokenizers and weights. Returns the hashes of the files of weights; ``done`` is told of values written."""
    found = vocabularies.verify(tokenizers)
    if found != config.vocabulary:
        raise UserError(f"{tokenizers} are not the tokenizers that the model was trained with: its vocabulary has other hashes")
    target = folder / TOKENIZERS_NAME
    (target / IMAGE_NAME).mkdir(parents=True)
    shutil.copyfile(tokenizers / TEXT_NAME, target / TEXT_NAME)
    image = tokenizers / IMAGE_NAME
    for source in (image / IMAGE_CONFIG_NAME, weights_path(image)):
        shutil.copyfile(source, target / IMAGE_NAME / source.name)
    found.save(target / VOCABULARY_NAME)
    tensors.check_table(held, config.shapes, "the model")
    return tensors.write(folder, config.shapes, held, DTYPES[config.dtype], shard_bytes, done)


def finish(folder: Path, config: ReleaseConfig, hashes: dict[str, str]) -> None:
    """What people and loaders read first, and the manifest over all of it."""
    told = cards.facts(config.card, config.build_objective(), config.options, config.vocabulary, config.grid, config.dtype)
    write_atomically(folder / CARD_NAME, cards.markdown(config.card, told))
    config.save(folder / CONFIG_NAME)
    manifest.make(folder, hashes)
