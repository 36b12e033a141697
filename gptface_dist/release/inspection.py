"""Describe the content of a release or a training checkpoint."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from gptface_dist.checkpoint.folder import FOLDER_NAME, LATEST_NAME
from gptface_dist.checkpoint.local_shard import WEIGHTS
from gptface_dist.checkpoint.manifest import MANIFEST_NAME
from gptface_dist.checkpoint.record import RECORD_FORMAT, RECORD_NAME
from gptface_dist.errors import UserError
from gptface_dist.files import sha256
from gptface_dist.model.parameters import LAYER
from gptface_dist.objectives.registry import build_objective
from gptface_dist.release import card as cards
from gptface_dist.release import manifest
from gptface_dist.release.checkpoint import TrainingCheckpoint
from gptface_dist.release.config import CONFIG_NAME, FORMAT, ReleaseConfig
from gptface_dist.release.tensors import Weights
from gptface_dist.tokenizers.vocabulary import Vocabulary


@dataclass(frozen=True)
class HeldTensor:
    """One tensor of the folder, or several of one shape in consecutive layers."""

    name: str
    """Name of the tensor; ``layers.0-11.qkv.weight`` for those of several layers."""
    count: int
    """Number of tensors."""
    shape: tuple[int, ...]
    """Shape of each tensor."""
    dtype: str
    """``float32`` or ``bfloat16``."""
    where: str
    """File in a release; fingerprint in a checkpoint, whose files depend on the layout. Empty for several tensors."""

    @property
    def values(self) -> int:
        """Number of values in all of the tensors."""
        return self.count * math.prod(self.shape)


@dataclass(frozen=True)
class Inspection:
    """Facts and tensors of a release or a checkpoint."""

    path: Path
    """Folder of the release or checkpoint, with ``latest`` resolved."""
    kind: str
    """``release`` or ``checkpoint``."""
    facts: dict[str, str]
    """Formatted facts by title."""
    tensors: list[HeldTensor]
    """Every tensor, in the order of the files."""


def inspect(path: Path) -> Inspection:
    """Describe a release, a checkpoint, or the latest checkpoint of a run.

    :class:`UserError` where the path is none of them, or a file needed for the description is damaged.
    """
    if (path / CONFIG_NAME).is_file():
        return _release(path)
    if any((path / name).exists() for name in (RECORD_NAME, FOLDER_NAME, LATEST_NAME)):
        return _checkpoint(TrainingCheckpoint.open(path))
    raise UserError(f"{path} is neither a release ({CONFIG_NAME}) nor a checkpoint ({RECORD_NAME}) nor a run ({FOLDER_NAME}/)")


def verify(path: Path) -> Iterator[str]:
    """Yield one line for each file of an inspected folder that is missing or has changed since it was written."""
    if (path / CONFIG_NAME).is_file():
        yield from manifest.problems(path, manifest.read(path))
    else:
        checkpoint = TrainingCheckpoint.open(path)
        yield from checkpoint.manifest.problems(checkpoint.path, checkpoint.manifest.files)


def group(inspection: Inspection) -> list[HeldTensor]:
    """The model's tensors, with those that differ only in their layer in one row; EMA and moments are left out."""
    grouped: dict[tuple[str, tuple[int, ...], str], list[HeldTensor]] = {}
    for tensor in inspection.tensors:
        if inspection.kind == "checkpoint":
            if not tensor.name.startswith(f"{WEIGHTS}/"):
                continue
            tensor = replace(tensor, name=tensor.name.removeprefix(f"{WEIGHTS}/"))
        grouped.setdefault((LAYER.sub("layers.{}.", tensor.name), tensor.shape, tensor.dtype), []).append(tensor)
    rows = []
    for (pattern, shape, dtype), alike in grouped.items():
        layers = [int(match.group(1)) for tensor in alike if (match := LAYER.search(tensor.name))]
        if len(layers) > 1:
            rows.append(HeldTensor(pattern.format(f"{min(layers)}-{max(layers)}"), len(alike), shape, dtype, ""))
        else:
            rows += alike
    return rows


def _release(path: Path) -> Inspection:
    config = ReleaseConfig.load(path)
    known = manifest.read(path)
    weights = Weights(path)
    names = {"F32": "float32", "BF16": "bfloat16"}
    facts = {"Format": FORMAT, "Name": config.card.name}
    facts |= cards.facts(config.card, config.build_objective(), config.options, config.vocabulary, config.grid, config.dtype)
    facts |= _common(config.card, config.vocabulary, path, [size for size, _ in known.values()])
    tensors = [
        HeldTensor(name, 1, shape, names.get(weights.dtypes[name], weights.dtypes[name]), weights.file(name))
        for name, shape in weights.shapes.items()
    ]
    return Inspection(path, "release", facts, tensors)


def _checkpoint(checkpoint: TrainingCheckpoint) -> Inspection:
    entries = checkpoint.manifest.tensors
    kinds: dict[str, int] = {}
    for key, entry in entries.items():
        kind = key.partition("/")[0]
        kinds[kind] = kinds.get(kind, 0) + math.prod(entry.shape)
    facts = {"Format": RECORD_FORMAT, "Holds": ", ".join(f"{kind} ({values:,} values)" for kind, values in kinds.items())}
    described = cards.facts(
        checkpoint.card,
        build_objective(checkpoint.objective, {}),
        checkpoint.options,
        checkpoint.vocabulary,
        checkpoint.reference.batch.grid,
        "float32",
    )
    facts |= {title: fact for title, fact in described.items() if not title.startswith(("Licence", "Weights"))}
    facts |= _common(
        checkpoint.card, checkpoint.vocabulary, checkpoint.path, [entry.bytes for entry in checkpoint.manifest.files.values()]
    )
    tensors = [HeldTensor(key, 1, entry.shape, entry.dtype, entry.fingerprint) for key, entry in entries.items()]
    return Inspection(checkpoint.path, "checkpoint", facts, tensors)


def _common(card: cards.Card, vocabulary: Vocabulary, path: Path, sizes: list[int]) -> dict[str, str]:
    return {
        "Last losses": ", ".join(f"{name} {value:.4g}" for name, value in card.losses.items()) or cards.UNKNOWN,
        "Text tokenizer": f"sha256 {vocabulary.text_sha256}",
        "Image tokenizer": f"sha256 {vocabulary.image_sha256}",
        "Manifest": f"sha256 {sha256(path / MANIFEST_NAME)}",
        "Files": f"{len(sizes)}, {sum(sizes):,} bytes",
    }
