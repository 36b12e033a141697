"""The configuration of a run: dataclasses, read from YAML with ``key=value`` overrides.

Each part's dataclass stands beside the code that obeys it; this module joins them and reads files.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import omegaconf
import yaml
from omegaconf import OmegaConf

from gptface_dist.data.batch import BatchOptions
from gptface_dist.data.masking import MaskingOptions
from gptface_dist.data.stream import StreamOptions
from gptface_dist.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class SourceConfig:
    """One source of training data."""

    path: str
    """Folder, or URL of a folder, of token shards."""
    weight: float = 1.0
    """Share of the run's blocks, relative to the other sources' weights."""


@dataclass(frozen=True)
class DataConfig:
    """What a run reads, and in which order."""

    tokenizers: str
    """Folder of the tokenizers that made the tokens (``vocabulary.json``)."""
    sources: list[SourceConfig]
    """The token shards."""
    global_batch: int = 256
    """Samples of one optimizer step, over all ranks."""
    micro_batch: int = 8
    """Samples of one forward pass on one rank; a multiple of ``order.block``."""
    order: StreamOptions = field(default_factory=StreamOptions)
    """Seed and order of the samples."""
    masking: MaskingOptions = field(default_factory=MaskingOptions)
    """What is to be predicted."""
    batch: BatchOptions = field(default_factory=BatchOptions)
    """Lengths and pairs."""
    workers: int = 2
    """Worker processes a rank; 0 prepares batches in the training process. Changes nothing in the batches."""
    skip_list: str | None = None
    """File of sample keys to leave out, one a line."""
    max_bad_fraction: float = 0.01
    """Share of unreadable samples past which the run stops."""


@dataclass(frozen=True)
class Config:
    """A whole run."""

    data: DataConfig
    """What it reads."""


def load(kind: type[T], path: Path, overrides: list[str]) -> T:
    """Read a YAML file as the dataclass ``kind``; ``overrides`` are ``key.key=value``, the last one wins.

    :class:`UserError` names the file and the key for unknown keys, missing ones and values of a wrong type.
    """
    try:
        loaded = OmegaConf.load(path)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(loaded, omegaconf.DictConfig):
        raise UserError(f"{path} is a list: a configuration is a mapping of keys to values")
    for override in overrides:
        if "=" not in override or override.startswith("="):
            raise UserError(f"override {override!r} is not of the form key=value")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(kind), loaded, OmegaConf.from_dotlist(overrides))
        found: Any = OmegaConf.to_object(merged)
    except (omegaconf.errors.OmegaConfBaseException, yaml.YAMLError) as error:
        key = getattr(error, "full_key", None)
        reason = str(error).split("\n")[0]
        raise UserError(f"{path}{f', key {key}' if key else ''}: {reason}") from None
    return found
