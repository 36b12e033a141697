"""Load dataclasses from YAML, apply ``key=value`` overrides, list all options with their documentation."""

import ast
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import omegaconf
import yaml
from omegaconf import OmegaConf

from gptface_dist.errors import UserError, one_line

T = TypeVar("T")
_MISTAKES = (omegaconf.errors.OmegaConfBaseException, yaml.YAMLError)


def load_config(kind: type[T], path: Path, overrides: list[str]) -> T:
    """Read a YAML file as the dataclass ``kind``; ``overrides`` are ``key.key=value``, the last one wins.

    A part that is the name of a YAML file is loaded from that file, relative to the file that names it; in an override,
    relative to the working folder.

    :class:`UserError` names the file and the key for unknown keys, missing ones and values of a wrong type.
    """
    loaded = _part(_read(path), path.parent)
    for override in overrides:
        _check_form(override)
    try:
        # Whole files first, so that `model=models/base.yaml model.layers=2` changes the file's layers.
        names = [override for override in overrides if override.endswith((".yaml", ".yml"))]
        values = [override for override in overrides if override not in names]
        for name in names:
            loaded.update(_part(OmegaConf.from_dotlist([name]), Path()))
        merged = OmegaConf.merge(OmegaConf.structured(kind), loaded, OmegaConf.from_dotlist(values))
        config: Any = OmegaConf.to_object(merged)
    except _MISTAKES as error:
        key = getattr(error, "full_key", None)
        raise UserError(f"{path}{f', key {key}' if key else ''}: {_reason(error)}") from None
    return config


def override(base: T, overrides: list[str]) -> T:
    """Apply ``key.key=value`` overrides to a copy of a dataclass instance, the last one wins.

    :class:`UserError` quotes the override with an unknown key or a value of a wrong type and lists the keys.
    """
    merged = OmegaConf.structured(base)
    for text in overrides:
        try:
            _check_form(text)
            # Resolved by itself: a reference to nowhere fails here, with its own override in the message.
            change = OmegaConf.to_container(OmegaConf.from_dotlist([text]), resolve=True, throw_on_missing=True)
            merged = OmegaConf.merge(merged, change)
        except (UserError, *_MISTAKES) as error:
            reason = str(error) if isinstance(error, UserError) else f"override {text!r}: {_reason(error)}"
            raise UserError(f"{reason} (keys: {', '.join(option.key for option in options(base))})") from None
    result: Any = OmegaConf.to_object(merged)
    return result


@dataclass(frozen=True)
class Option:
    """One leaf of a configuration, which ``key=value`` can set."""

    key: str
    """Path of field names, joined by dots."""
    value: object
    """Value in the instance that was listed."""
    meaning: str
    """The docstring under the field, on one line; empty if it has none."""


def options(base: Any, prefix: str = "") -> Iterator[Option]:
    """Yield all options of a dataclass instance, those of nested dataclasses included, in field order."""
    meanings = _meanings(type(base))
    for field in fields(base):
        key, value = prefix + field.name, getattr(base, field.name)
        if is_dataclass(value):
            yield from options(value, f"{key}.")
        else:
            yield Option(key, value, meanings.get(field.name, ""))


def _meanings(kind: type) -> dict[str, str]:
    """Docstrings of a dataclass's fields, parsed from its source: Python does not keep them."""
    meanings = {}
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    for field, text in pairwise(ast.iter_child_nodes(definition)):
        match field, text:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(meaning))):
                meanings[name] = " ".join(meaning.replace("``", "`").split())
    return meanings


def _check_form(override: str) -> None:
    if "=" not in override or override.startswith(("=", "[")):
        raise UserError(f"override {override!r} is not of the form key=value")


def _reason(error: Exception) -> str:
    """The problem in an error of OmegaConf or YAML as one line; YAML's first line only names the context."""
    return str(getattr(error, "problem", None) or error).split("\n")[0]


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
    """Replace each value that names a YAML file by the content of that file, in place."""
    for key, value in loaded.items():
        if isinstance(value, str) and value.endswith((".yaml", ".yml")):
            loaded[key] = _read(folder / value)
    return loaded
