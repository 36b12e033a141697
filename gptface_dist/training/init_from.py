"""Initial weights of a run from a release, on any layout."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from gptface_dist.checkpoint.local_shard import WEIGHTS, OptimizerStateView
from gptface_dist.checkpoint.tensor_shards import collect_shards
from gptface_dist.errors import UserError
from gptface_dist.model.options import ModelOptions
from gptface_dist.objectives.registry import ObjectiveOptions
from gptface_dist.release.config import ReleaseConfig
from gptface_dist.tokenizers.vocabulary import Vocabulary

FREE = ("hidden_dropout", "attention_dropout", "init_std")
"""Model options in which a run may differ from its release."""


def check_release(path: Path, objective: ObjectiveOptions, options: ModelOptions, vocabulary: Vocabulary) -> None:
    """Refuse a release of another objective or model, or of other tokenizers."""
    config = ReleaseConfig.load(path)
    pairs = (
        ("objective", asdict(config.objective), asdict(objective)),
        ("model", asdict(config.options), asdict(options)),
        ("vocabulary", asdict(config.vocabulary), asdict(vocabulary)),
    )
    differences = [
        f"{what}.{name} is {now[name]!r}, the release's is {saved[name]!r}"
        for what, saved, now in pairs
        for name in saved
        if saved[name] != now[name] and name not in FREE
    ]
    if differences:
        raise UserError(f"run.init_from: {path} is of another model: {'; '.join(differences)}")


def load_weights(weights: Mapping[str, Tensor], state: OptimizerStateView) -> None:
    """Copy whole tensors, by global name, into this rank's shards of the weights, one at a time; moments do not change."""
    with torch.no_grad():
        for key, shards in collect_shards(state.local_shards(), written=False).items():
            kind, name = key.split("/", 1)
            if kind != WEIGHTS:
                continue
            whole = weights[name]
            for chunk in shards.pieces:
                spec = chunk.box
                slices = tuple(slice(at, at + size) for at, size in zip(spec.offsets, spec.sizes, strict=True))
                chunk.memory.copy_(whole[slices])
    state.refresh()
