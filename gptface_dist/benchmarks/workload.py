"""Synthetic training work: a model, and batches of random captions and image codes."""

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
    """The work of one optimizer step, independent of the system that does it."""

    model: ModelOptions
    """Size and form of the model; without dropout."""
    micro_batches: int = 8
    """Micro-batches of the global batch, over all replicas."""
    size: int = 4
    """Sequences in a micro-batch."""
    text_length: int = 48
    """Longest caption in tokens; captions have all lengths up to this, and are padded to it."""
    grid: int = 16
    """Rows and columns of a picture's codes."""
    text_ids: int = 384
    """Number of text ids."""
    image_codes: int = 512
    """Number of image codes."""
    objective: Objective = field(default_factory=MilmItm)
    """Training objective."""
    engine: EngineOptions = field(default_factory=EngineOptions)
    """Precision of the engine."""
    seed: int = 0
    """Seed of initial weights and batches."""

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
        """The joint ids, with zeros as hashes: no tokenizers belong to them."""
        return Vocabulary(self.text_ids, self.image_codes, text_sha256="0" * 64, image_sha256="0" * 64)

    def batches(self, step: int, device: torch.device | str = "cpu") -> list[PaddedBatch[Tensor]]:
        """The micro-batches of a step's global batch, all of one shape; a function of (seed, step)."""
        rng, grid = np.random.default_rng([self.seed, step]), (self.grid, self.grid)
        batch = BatchOptions(text_length=self.text_length, buckets=1)
        build = self.objective.collate(DataConfig("", [], order=StreamOptions(self.seed), batch=batch), self.vocabulary, grid)
        blocks = (
            made_up_block(rng, self.vocabulary, grid, self.text_length, number, self.size, str(step))
            for number in range(self.micro_batches)
        )
        return [build([block]).tensors(device) for block in blocks]

    def work(self, batches: Iterable[PaddedBatch[Tensor]]) -> Work:
        """Token counts of a step on these micro-batches, for the count of its floating-point operations."""
        lengths = [int(length) for batch in batches for length in batch.lengths.tolist()]
        counts = zip(*(self.objective.counts(batch) for batch in batches), strict=True)
        return Work(sum(lengths), sum(length**2 for length in lengths), tuple(map(sum, counts)))
