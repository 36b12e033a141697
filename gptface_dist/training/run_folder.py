"""The folder of a run and its ``config.yaml``, which identifies the run."""

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


def prepare_run_dir(config: Config) -> None:
    """Create the run's folder, or check that it belongs to this run, and write ``config.yaml``.

    :class:`UserError` if the folder holds a run with other :data:`KEPT` parts; nothing is overwritten then.
    """
    folder, now = Path(config.run.folder), resolved(config)
    path = folder / NAME
    try:
        if path.exists():
            text = path.read_text(encoding="utf-8")
            if not text.startswith(HEADER):
                raise UserError(
                    f"{path} does not begin with {HEADER!r}: it is of another version of gptface_dist, whose keys are others; "
                    "resume it with that version, or choose another run.folder"
                )
            before = yaml.safe_load(text)
            for part in KEPT:
                _compare(part, _at(before, part), _at(now, part), folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, f"{HEADER}\n{yaml.safe_dump(now, sort_keys=False)}")
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"run.folder {folder} cannot be used: {one_line(error)}") from None


def _at(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = config.get(name) if isinstance(config, dict) else None
    return config


def _compare(key: str, before: Any, now: Any, folder: Path) -> None:
    if isinstance(before, dict) and isinstance(now, dict):
        for name in now:
            # Keys missing in the earlier configuration are new in this version.
            if name in before:
                _compare(f"{key}.{name}", before[name], now[name], folder)
    elif before != now and before is not None:
        raise UserError(
            f"run.folder {folder} holds a run with {key}={before}, this one has {now}: choose another folder, or set it back"
        )
