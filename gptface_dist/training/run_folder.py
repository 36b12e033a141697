"""The folder of a run and its ``config.yaml``, which identifies the run."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from gptface_dist.errors import UserError, one_line
from gptface_dist.files import write_atomically
from gptface_dist.training.config import Config

NAME = "config.yaml"
HEADER = "# gptface-config-2"
"""First line of the file: its format. A comment, so that the file is a configuration like any other."""

KEPT = (
    "objective",
    "model",
    "optimizer",
    "loss",
    "schedule",
    "run.seed",
    "data.global_batch",
    "data.order",
    "data.masking",
    "data.batch",
)
"""Parts of the configuration that must not change when a run resumes; layout, paths and intervals may."""


def resolved(config: Config) -> dict[str, Any]:
    """The whole configuration, defaults included, as plain values."""
    container: Any = OmegaConf.to_container(OmegaConf.structured(config))
    return container


def settled(config: Config) -> Config:
    """The configuration with its schedule's length filled in: that of the run in the folder, else ``run.steps``.

    :class:`UserError` if the folder holds a run with other :data:`KEPT` parts. Nothing is written.
    """
    before = _kept_config(Path(config.run.folder) / NAME)
    # Runs of earlier versions had the length of their first start.
    begun = _at(before, "schedule.total_steps") or _at(before, "run.steps")
    total_steps = config.schedule.total_steps or begun or config.run.steps
    config = replace(config, schedule=replace(config.schedule, total_steps=total_steps))
    config.schedule.check(total_steps)
    now = resolved(config)
    for part in KEPT:
        _compare(part, _at(before, part), _at(now, part), config.run.folder)
    return config


def write_config(config: Config) -> None:
    """Write ``config.yaml`` of a settled configuration. :class:`UserError` if that cannot be done, or as in :func:`settled`."""
    folder = Path(config.run.folder)
    text = f"{HEADER}\n{yaml.safe_dump(resolved(settled(config)), sort_keys=False)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / NAME, text)
    except OSError as error:
        raise UserError(f"run.folder {folder} cannot be used: {one_line(error)}") from None


def _kept_config(path: Path) -> dict[str, Any]:
    """The configuration that a run was begun with; empty if there is none."""
    try:
        if not path.exists():
            return {}
        text = path.read_text(encoding="utf-8")
        if not text.startswith(HEADER):
            raise UserError(
                f"{path} does not begin with {HEADER!r}: it is of another version of gptface_dist, whose keys are others; "
                "resume it with that version, or choose another run.folder"
            )
        config: dict[str, Any] = yaml.safe_load(text)
        return config
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be used: {one_line(error)}") from None


def _at(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = config.get(name) if isinstance(config, dict) else None
    return config


def _compare(key: str, before: Any, now: Any, folder: str) -> None:
    if isinstance(before, dict) and isinstance(now, dict):
        for name in now:
            # Keys missing in the earlier configuration are new in this version.
            if name in before:
                _compare(f"{key}.{name}", before[name], now[name], folder)
    elif before != now and before is not None:
        raise UserError(
            f"run.folder {folder} holds a run with {key}={before}, this one has {now}: choose another folder, or set it back"
        )
