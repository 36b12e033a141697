"""Write a release atomically: into a temporary folder that is renamed at the end and removed on any failure."""

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
        model: the model to release; its parameters may be on any device.
        tokenizers: folder with the ``text.model``, ``image/`` and ``vocabulary.json`` that the model was trained with.
        path: folder to make; must not exist.
        grid: rows and columns of the image codes in training.
        card: provenance of the release.
        dtype: dtype of the stored weights, float32 or bfloat16.
        shard_bytes: largest file of weights in bytes, unless one tensor alone is larger.
        objective: the training objective, which determines the heads.

    :class:`UserError` where the path exists or the tokenizers are not the model's.
    """
    config = ReleaseConfig(objective, model.options, model.vocabulary, grid, dtype_name(dtype), card)
    with publishing(path) as folder:
        hashes = write_model(folder, config, tokenizers, dict(model.named_parameters()), shard_bytes)
        batch = reference_batch(model.vocabulary, grid, model.options.text_positions - SPECIALS_PER_SEQUENCE)
        # The outputs of the weights on disk, loaded again, not of those in memory.
        outputs = reference_outputs(config.build_objective(), load_model(folder, config, dtype=torch.float32), batch)
        ReferenceOutputs(batch, outputs, "float32").save(folder / REFERENCE_NAME)
        finish(folder, config, hashes)


@contextmanager
def publishing(path: Path) -> Iterator[Path]:
    """A temporary folder beside ``path``: flushed and renamed to ``path`` at the end, removed on any error."""
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
    weights: Mapping[str, Tensor],
    shard_bytes: int,
    done: Callable[[int], None] = lambda values: None,
) -> dict[str, str]:
    """Copy the tokenizers and write the weights.

    Returns the SHA-256 of each file of weights, by name; ``done`` is called with the number of values written.
    """
    vocabulary = vocabularies.verify(tokenizers)
    if vocabulary != config.vocabulary:
        raise UserError(f"{tokenizers} are not the tokenizers that the model was trained with: its vocabulary has other hashes")
    target = folder / TOKENIZERS_NAME
    (target / IMAGE_NAME).mkdir(parents=True)
    shutil.copyfile(tokenizers / TEXT_NAME, target / TEXT_NAME)
    image = tokenizers / IMAGE_NAME
    for source in (image / IMAGE_CONFIG_NAME, weights_path(image)):
        shutil.copyfile(source, target / IMAGE_NAME / source.name)
    vocabulary.save(target / VOCABULARY_NAME)
    tensors.check_table(weights, config.shapes, "the model")
    return tensors.write(folder, config.shapes, weights, DTYPES[config.dtype], shard_bytes, done)


def finish(folder: Path, config: ReleaseConfig, hashes: dict[str, str]) -> None:
    """Write the model card, ``config.json``, and last the manifest over all files."""
    rows = cards.facts(config.card, config.build_objective(), config.options, config.vocabulary, config.grid, config.dtype)
    write_atomically(folder / CARD_NAME, cards.markdown(config.card, rows))
    config.save(folder / CONFIG_NAME)
    manifest.make(folder, hashes)
