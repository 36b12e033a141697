"""``run.json``: what a checkpoint says about its run, beside the tensors."""

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
    """A run at one step. All of it is JSON."""

    step: int
    """Optimizer steps done."""
    updates: int
    """Updates that the optimizer made: fewer than steps where some were skipped."""
    state: dict[str, Any]
    """Where the run stands: position in the data, counts, and what callbacks keep (:mod:`gptface_dist.training`)."""
    config: dict[str, Any]
    """The whole resolved configuration; ``model`` and ``layout`` are parts of it."""
    vocabulary: dict[str, Any]
    """The joint vocabulary's fields."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Metrics of the last step."""
    origin: str = ""
    """SHA-256 of the manifest of the named checkpoint that the run was told to go on from; empty if there was none."""
    versions: dict[str, str] = field(default_factory=dict)
    """Of the software that wrote it, by name."""

    def text(self) -> str:
        """Content of the file."""
        return json.dumps({"format": RECORD_FORMAT, **asdict(self)}, indent=1) + "\n"

    @classmethod
    def read(cls, folder: Path) -> "RunRecord":
        """Of a checkpoint. :class:`UserError` where there is none, or one of another format."""
        path = folder / RECORD_NAME
        try:
            raw = json.loads(path.read_bytes())
            if raw["format"] != RECORD_FORMAT:
                raise UserError(f"{path} has the format {raw['format']!r}, not {RECORD_FORMAT!r}: use the version it is of")
            return cls(**{one.name: raw[one.name] for one in fields(cls)})
        except UserError:
            raise
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}; is {folder} a checkpoint?") from None
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is no record of a run ({type(error).__name__}: {error})") from None

    def differences(self, model: dict[str, Any], objective: dict[str, Any], vocabulary: Vocabulary) -> list[str]:
        """What prevents a resumption with this model, objective and vocabulary: one line each, with both values."""
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
