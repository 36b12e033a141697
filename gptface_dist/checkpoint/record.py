"""``run.json``: step, configuration and state of the run that a checkpoint belongs to."""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from gptface_dist.errors import UserError
from gptface_dist.tokenizers.vocabulary import Vocabulary

RECORD_NAME = "run.json"
RECORD_FORMAT = "gptface-run-2"


@dataclass(frozen=True)
class RunRecord:
    """State of a run at one step, without tensors; all values are JSON."""

    step: int
    """Optimizer steps done."""
    updates: int
    """Optimizer updates done: steps minus skipped updates."""
    state: dict[str, Any]
    """Position in the data, counts, and the callbacks' states (:class:`gptface_dist.training.state.TrainState`)."""
    config: dict[str, Any]
    """Resolved configuration, defaults included."""
    vocabulary: dict[str, Any]
    """Fields of the joint vocabulary."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Metrics of the last step."""
    origin: str = ""
    """SHA-256 of the manifest of the checkpoint in ``checkpoint.resume_from``; empty if none was given."""
    versions: dict[str, str] = field(default_factory=dict)
    """Version by name of the software that wrote the checkpoint."""

    def text(self) -> str:
        """Content of ``run.json``."""
        return json.dumps({"format": RECORD_FORMAT, **asdict(self)}, indent=1) + "\n"

    @classmethod
    def read(cls, folder: Path) -> "RunRecord":
        """Read the record of a checkpoint. :class:`UserError` if it is missing, broken or of another format."""
        path = folder / RECORD_NAME
        try:
            return cls.parse(path.read_text(encoding="utf-8"), path)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}; is {folder} a checkpoint?") from None
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is no record of a run ({error})") from None

    @classmethod
    def parse(cls, text: str, path: Path) -> "RunRecord":
        """The record of :meth:`text`. :class:`UserError`, which names ``path``, if it is broken or of another format."""
        try:
            raw = json.loads(text)
            if raw["format"] != RECORD_FORMAT:
                raise UserError(f"{path} has the format {raw['format']!r}, not {RECORD_FORMAT!r}: use the version it is of")
            return cls(**{field.name: raw[field.name] for field in fields(cls)})
        except UserError:
            raise
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is no record of a run ({type(error).__name__}: {error})") from None

    def differences(self, model: dict[str, Any], objective: dict[str, Any], vocabulary: Vocabulary) -> list[str]:
        """Differences that prevent resuming with this model, objective and vocabulary: one line each, with both values."""
        lines = []
        pairs = (
            ("model", self.config["model"], model),
            ("objective", self.config["objective"], objective),
            ("vocabulary", self.vocabulary, asdict(vocabulary)),
        )
        for what, saved, now in pairs:
            for name in sorted(saved.keys() | now.keys()):
                if saved.get(name) != now.get(name):
                    lines.append(f"{what}.{name} is {now.get(name)!r}, the checkpoint's is {saved.get(name)!r}")
        return lines
