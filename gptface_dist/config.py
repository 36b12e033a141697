"""The configuration of a run: dataclasses, read from YAML with ``key=value`` overrides.

Each part's dataclass stands beside the code that obeys it; this module joins them and reads files.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import omegaconf
import yaml
from omegaconf import OmegaConf

from gptface_dist.checkpoint.options import CheckpointOptions
from gptface_dist.data.options import DataConfig
from gptface_dist.errors import UserError
from gptface_dist.model.options import ModelOptions
from gptface_dist.parallel.layout import Layout
from gptface_dist.parallel.options import EngineOptions, LossWeights, OptimizerOptions
from gptface_dist.training.options import AttentionHealthOptions, EvaluationOptions, RunOptions, TrackingOptions
from gptface_dist.training.schedule import ScheduleOptions

T = TypeVar("T")


@dataclass(frozen=True)
class Config:
    """A whole run."""

    data: DataConfig
    """What it reads."""
    model: ModelOptions = field(default_factory=ModelOptions)
    """What is trained; in a file also the name of another one, relative to it: ``model: models/base.yaml``."""
    layout: Layout = field(default_factory=Layout)
    """How it is laid out over processes."""
    engine: EngineOptions = field(default_factory=EngineOptions)
    """How a step is computed."""
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    """AdamW and clipping."""
    loss: LossWeights = field(default_factory=LossWeights)
    """What the three losses weigh."""
    schedule: ScheduleOptions = field(default_factory=ScheduleOptions)
    """The learning rate over time."""
    run: RunOptions = field(default_factory=RunOptions)
    """Length, seed and place of the run."""
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)
    """When it is saved, and what it goes on from."""
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)
    """Held-out data."""
    attention_health: AttentionHealthOptions = field(default_factory=AttentionHealthOptions)
    """Reports on FP8 attention."""
    tracking: TrackingOptions = field(default_factory=TrackingOptions)
    """mlflow."""

    def __post_init__(self) -> None:
        self.schedule.check(self.run.steps)


def load(kind: type[T], path: Path, overrides: list[str]) -> T:
    """Read a YAML file as the dataclass ``kind``; ``overrides`` are ``key.key=value``, the last one wins.

    A part that is the name of a YAML file is read from there, relative to the file that names it; an override that names
    one, relative to the working folder.

    :class:`UserError` names the file and the key for unknown keys, missing ones and values of a wrong type.
    """
    loaded = _part(_read(path), path.parent)
    for override in overrides:
        if "=" not in override or override.startswith("="):
            raise UserError(f"override {override!r} is not of the form key=value")
    try:
        # Whole files first, so that `model=models/base.yaml model.layers=2` changes the file's layers.
        names = [override for override in overrides if override.endswith((".yaml", ".yml"))]
        values = [override for override in overrides if override not in names]
        for name in names:
            loaded.update(_part(OmegaConf.from_dotlist([name]), Path()))
        merged = OmegaConf.merge(OmegaConf.structured(kind), loaded, OmegaConf.from_dotlist(values))
        found: Any = OmegaConf.to_object(merged)
    except (omegaconf.errors.OmegaConfBaseException, yaml.YAMLError) as error:
        key = getattr(error, "full_key", None)
        reason = str(error).split("\n")[0]
        raise UserError(f"{path}{f', key {key}' if key else ''}: {reason}") from None
    return found


def _read(path: Path) -> omegaconf.DictConfig:
    try:
        loaded = OmegaConf.load(path)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(loaded, omegaconf.DictConfig):
        raise UserError(f"{path} is a list: a configuration is a mapping of keys to values")
    return loaded


def _part(loaded: omegaconf.DictConfig, folder: Path) -> omegaconf.DictConfig:
    """The configuration with the parts that are names of YAML files read from those."""
    for key, value in loaded.items():
        if isinstance(value, str) and value.endswith((".yaml", ".yml")):
            loaded[key] = _read(folder / value)
    return loaded
