"""A made-up amount of training work: a model, and batches of captions and pictures that exist nowhere."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from gptface_dist.data.batch import BatchOptions
from gptface_dist.data.made_up import made_up_block
from gptface_dist.data.options import DataConfig
from gptface_dist.data.stream import StreamOptions
from gptface_dist.errors import UserError
from gptface_dist.model.flops import Work
from gptface_dist.model.options import ModelOptions
from gptface_dist.objectives.milm_itm import MilmItm
from gptface_dist.objectives.objective import Objective
from gptface_dist.parallel.options import EngineOptions
from gptface_dist.sequence import SPECIALS_PER_SEQUENCE, PaddedBatch
from gptface_dist.tokenizers.vocabulary import Vocabulary


@dataclass(frozen=True)
class Workload:
    """What one optimizer step has to do, whatever does it."""

    model: ModelOptions
    """The model."""
    micro_batches: int = 8
    """Micro-batches of the global batch."""
    size: int = 4
    """Sequences of a micro-batch."""
    text_length: int = 48
    """Longest caption in tokens; captions are of all lengths up to this, and padded to it."""
    grid: int = 16
    """Rows and columns of a picture's codes."""
    text_ids: int = 384
    """Ids of text."""
    image_codes: int = 512
    """Codes of pictures."""
    objective: Objective = field(default_factory=MilmItm)
    """What is trained."""
    engine: EngineOptions = field(default_factory=EngineOptions)
    """The precision."""
    seed: int = 0
    """Of initial weights and batches."""

    def __post_init__(self) -> None:
        for name in ("micro_batches", "size", "text_length", "grid", "text_ids", "image_codes"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        model = self.model
        if self.grid > min(model.rows, model.columns):
            raise UserError(
                f"the model has positions for {model.rows}x{model.columns} codes: a grid of {self.grid} is too large"
            )
        if self.text_length + SPECIALS_PER_SEQUENCE > model.text_positions:
            most = model.text_positions - SPECIALS_PER_SEQUENCE
            raise UserError(f"the model has positions for captions of {most} tokens: {self.text_length} are too many")
        if model.hidden_dropout or model.attention_dropout:
            raise UserError(
                "the model has dropout, which is drawn differently by different systems: set it to 0 to compare them"
            )

    @property
    def vocabulary(self) -> Vocabulary:
        """The joint ids; their tokenizers do not exist."""
        return Vocabulary(self.text_ids, self.image_codes, text_sha256="0" * 64, image_sha256="0" * 64)

    def batches(self, step: int, device: torch.device | str = "cpu") -> list[PaddedBatch[Tensor]]:
        """The micro-batches of a step's global batch: all of one shape."""
        rng, grid = np.random.default_rng([self.seed, step]), (self.grid, self.grid)
        batch = BatchOptions(text_length=self.text_length, buckets=1)
        build = self.objective.collate(DataConfig("", [], order=StreamOptions(self.seed), batch=batch), self.vocabulary, grid)
        blocks = (
            made_up_block(rng, self.vocabulary, grid, self.text_length, number, self.size, str(step))
            for number in range(self.micro_batches)
        )
        return [build([block]).tensors(device) for block in blocks]

    def work(self, batches: Iterable[PaddedBatch[Tensor]]) -> Work:
        """What a step on these micro-batches has to compute."""
        lengths = [int(length) for batch in batches for length in batch.lengths.tolist()]
        counts = zip(*(self.objective.counts(batch) for batch in batches), strict=True)
        return Work(sum(lengths), sum(length**2 for length in lengths), tuple(map(sum, counts)))
