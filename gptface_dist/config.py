"""Configuration read from YAML as dataclasses, with ``key=value`` overrides."""

from pathlib import Path
from typing import Any, TypeVar

import omegaconf
import yaml
from omegaconf import OmegaConf

from gptface_dist.errors import UserError, one_line

T = TypeVar("T")


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
        raise UserError(f"{path} is not YAML: {one_line(error)}") from None
    if not isinstance(loaded, omegaconf.DictConfig):
        raise UserError(f"{path} is a list: a configuration is a mapping of keys to values")
    return loaded


def _part(loaded: omegaconf.DictConfig, folder: Path) -> omegaconf.DictConfig:
    """The configuration with the parts that are names of YAML files read from those."""
    for key, value in loaded.items():
        if isinstance(value, str) and value.endswith((".yaml", ".yml")):
            loaded[key] = _read(folder / value)
    return loaded
