"""What a release or a training checkpoint holds, in words."""

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
    """One tensor, or several of one shape in consecutive layers."""

    name: str
    """Name; ``layers.0-11.qkv.weight`` for those of several layers."""
    count: int
    """How many tensors."""
    shape: tuple[int, ...]
    """Shape of each."""
    dtype: str
    """``float32`` or ``bfloat16``."""
    where: str
    """Its file in a release; its fingerprint in a checkpoint, where the files depend on the layout. Empty for several."""

    @property
    def values(self) -> int:
        """Numbers in all of them."""
        return self.count * math.prod(self.shape)


@dataclass(frozen=True)
class Inspection:
    """What a folder holds."""

    path: Path
    """The folder, after ``latest`` was followed."""
    kind: str
    """``release`` or ``checkpoint``."""
    facts: dict[str, str]
    """By title."""
    tensors: list[HeldTensor]
    """Each tensor, in order."""


def inspect(path: Path) -> Inspection:
    """Look into a release, a checkpoint, or a run (its latest checkpoint).

    :class:`UserError` where the path is none of them, or what is needed to tell is damaged.
    """
    if (path / CONFIG_NAME).is_file():
        return _release(path)
    if any((path / name).exists() for name in (RECORD_NAME, FOLDER_NAME, LATEST_NAME)):
        return _checkpoint(TrainingCheckpoint.open(path))
    raise UserError(f"{path} is neither a release ({CONFIG_NAME}) nor a checkpoint ({RECORD_NAME}) nor a run ({FOLDER_NAME}/)")


def verify(path: Path) -> Iterator[str]:
    """One line for each file of an inspected folder that is missing or not what was written."""
    if (path / CONFIG_NAME).is_file():
        yield from manifest.problems(path, manifest.read(path))
    else:
        held = TrainingCheckpoint.open(path)
        yield from held.manifest.problems(held.path, held.manifest.files)


def group(found: Inspection) -> list[HeldTensor]:
    """The model's tensors, those that differ by nothing but their layer as one; a checkpoint's other kinds have the same."""
    grouped: dict[tuple[str, tuple[int, ...], str], list[HeldTensor]] = {}
    for tensor in found.tensors:
        if found.kind == "checkpoint":
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
    held = Weights(path)
    names = {"F32": "float32", "BF16": "bfloat16"}
    facts = {"Format": FORMAT, "Name": config.card.name}
    facts |= cards.facts(config.card, config.build_objective(), config.options, config.vocabulary, config.grid, config.dtype)
    facts |= _common(config.card, config.vocabulary, path, [size for size, _ in known.values()])
    tensors = [
        HeldTensor(name, 1, shape, names.get(held.dtypes[name], held.dtypes[name]), held.file(name))
        for name, shape in held.shapes.items()
    ]
    return Inspection(path, "release", facts, tensors)


def _checkpoint(held: TrainingCheckpoint) -> Inspection:
    entries = held.manifest.tensors
    kinds: dict[str, int] = {}
    for key, entry in entries.items():
        kind = key.partition("/")[0]
        kinds[kind] = kinds.get(kind, 0) + math.prod(entry.shape)
    facts = {"Format": RECORD_FORMAT, "Holds": ", ".join(f"{kind} ({values:,} values)" for kind, values in kinds.items())}
    told = cards.facts(
        held.card,
        build_objective(held.objective, {}),
        held.options,
        held.vocabulary,
        held.reference.batch.grid,
        "float32",
    )
    facts |= {title: fact for title, fact in told.items() if not title.startswith(("Licence", "Weights"))}
    facts |= _common(held.card, held.vocabulary, held.path, [entry.bytes for entry in held.manifest.files.values()])
    tensors = [HeldTensor(key, 1, entry.shape, entry.dtype, entry.fingerprint) for key, entry in entries.items()]
    return Inspection(held.path, "checkpoint", facts, tensors)


def _common(card: cards.Card, vocabulary: Vocabulary, path: Path, sizes: list[int]) -> dict[str, str]:
    return {
        "Last losses": ", ".join(f"{name} {value:.4g}" for name, value in card.losses.items()) or cards.UNKNOWN,
        "Text tokenizer": f"sha256 {vocabulary.text_sha256}",
        "Image tokenizer": f"sha256 {vocabulary.image_sha256}",
        "Manifest": f"sha256 {sha256(path / MANIFEST_NAME)}",
        "Files": f"{len(sizes)}, {sum(sizes):,} bytes",
    }
