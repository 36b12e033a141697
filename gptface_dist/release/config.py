"""``config.json`` of a release: objective, model, vocabulary and provenance; Hugging Face's ``AutoConfig`` reads it, too."""

import functools
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from gptface_dist.errors import UserError
from gptface_dist.files import write_atomically
from gptface_dist.model.options import ModelOptions
from gptface_dist.objectives.objective import Objective
from gptface_dist.objectives.registry import ObjectiveOptions, build_objective
from gptface_dist.release import card as cards
from gptface_dist.release.card import Card
from gptface_dist.tokenizers.vocabulary import Vocabulary

CONFIG_NAME = "config.json"
FORMAT = "gptface-release-2"
MODEL_TYPE = "gptface"
ARCHITECTURE = "GPTFaceModel"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class ReleaseConfig:
    """The content of a release's ``config.json``."""

    objective: ObjectiveOptions
    """Training objective, which determines the heads."""
    options: ModelOptions
    """Size and form of the model."""
    vocabulary: Vocabulary
    """The joint ids and the hashes of their tokenizers."""
    grid: tuple[int, int]
    """Rows and columns of the image codes in training."""
    dtype: str
    """Dtype of the stored weights, a key of :data:`DTYPES`."""
    card: Card
    """Provenance of the release."""

    def __post_init__(self) -> None:
        if not (1 <= self.grid[0] <= self.options.rows and 1 <= self.grid[1] <= self.options.columns):
            raise UserError(
                f"a grid of {self.grid[0]} x {self.grid[1]} codes, but places for {self.options.rows} x {self.options.columns}"
            )
        if self.dtype not in DTYPES:
            raise UserError(f"dtype {self.dtype!r} is none of {', '.join(DTYPES)}")
        self.build_objective()

    def save(self, path: Path) -> None:
        """Write ``config.json``, whole or not at all."""
        raw = {
            "model_type": MODEL_TYPE,
            "architectures": [ARCHITECTURE],
            "dtype": self.dtype,
            "format": FORMAT,
            "objective": asdict(self.objective),
            "options": asdict(self.options),
            "vocabulary": asdict(self.vocabulary),
            "grid": list(self.grid),
            "training": cards.to_json(self.card),
        }
        write_atomically(path, json.dumps(raw, indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, folder: Path) -> "ReleaseConfig":
        """Load ``folder/config.json``; :class:`UserError` where the folder is no release or one of another format."""
        path = folder / CONFIG_NAME
        if not folder.is_dir():
            raise UserError(f"{folder} is no folder: give that of a release, as `gptface convert` writes it")
        if not path.is_file():
            raise UserError(f"{folder} holds no {CONFIG_NAME}: give the folder of a release, as `gptface convert` writes it")
        try:
            raw = json.loads(path.read_bytes())
            kind = raw.get("model_type") or raw.get("_class_name")
        except (ValueError, AttributeError) as error:
            raise UserError(f"{path} is no configuration ({error}): get the release again") from None
        if kind != MODEL_TYPE:
            raise UserError(f"{path} describes a model of type {kind!r}, not {MODEL_TYPE!r}: give a GPTFace release")
        if raw.get("format") != FORMAT:
            raise UserError(f"{path} has the format {raw.get('format')!r}, not {FORMAT!r}: use the gptface_dist of its making")
        try:
            return cls.from_json(raw)
        except (UserError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} contradicts itself ({type(error).__name__}: {error}): get the release again") from None

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> "ReleaseConfig":
        """Parse the content of ``config.json``; :class:`UserError`, ``KeyError`` or ``TypeError`` where it is invalid."""
        rows, columns = (int(side) for side in raw["grid"])
        options, vocabulary = ModelOptions(**raw["options"]), Vocabulary(**raw["vocabulary"])
        objective = ObjectiveOptions(**raw["objective"])
        return cls(objective, options, vocabulary, (rows, columns), raw["dtype"], cards.from_json(raw["training"]))

    @functools.cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Name -> shape of each of the model's tensors. Cached: it builds the model on the meta device."""
        table = self.build_objective().parameters(self.options, self.vocabulary)
        return {entry.name: entry.shape for entry in table}

    def build_objective(self) -> Objective:
        """Build the training objective, with default loss weights, which a release does not use."""
        return build_objective(self.objective, {})


def dtype_name(dtype: torch.dtype) -> str:
    """``float32`` or ``bfloat16``; :class:`UserError` for any other dtype, which a release cannot have."""
    for name, known in DTYPES.items():
        if dtype == known:
            return name
    raise UserError(f"a release is float32 or bfloat16, not {str(dtype).removeprefix('torch.')}")
