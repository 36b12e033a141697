"""What the parity check compares: a layout, a model, and the synthetic batches that both sides train on."""

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gptface_dist.data.batch import BatchOptions
from gptface_dist.data.made_up import made_up_block
from gptface_dist.data.masking import MaskingOptions
from gptface_dist.data.options import DataConfig
from gptface_dist.data.stream import StreamOptions
from gptface_dist.errors import UserError
from gptface_dist.model.options import ModelOptions
from gptface_dist.objectives.milm_itm import MilmItm
from gptface_dist.objectives.objective import Objective
from gptface_dist.parallel.layout import ZERO_STAGES, Layout
from gptface_dist.parallel.options import EngineOptions
from gptface_dist.sequence import PaddedBatch
from gptface_dist.tokenizers.vocabulary import Vocabulary

VOCABULARY = Vocabulary(text_size=43, image_codes=24, text_sha256="a" * 64, image_sha256="b" * 64)
"""67 + 4 ids, which no tensor-parallel size above 1 divides."""
GRID = (4, 4)
TEXT_LENGTH = 20
SAMPLES = 16
"""Default number of samples in the global batch."""
MODEL = ModelOptions(layers=4, hidden=16, heads=4, ffn=24, text_positions=32, rows=4, columns=4, init_std=0.3)


@dataclass(frozen=True)
class Case:
    """A configuration to compare with the plain model."""

    layout: Layout
    """Layout of the distributed model."""
    model: ModelOptions = MODEL
    """Size and form of the model."""
    steps: int = 3
    """Number of optimizer steps."""
    micro_batches: int = 8
    """Micro-batches of the global batch, over all replicas."""
    size: int = SAMPLES // 8
    """Sequences of a micro-batch."""
    seed: int = 0
    """Seed of weights, batches and dropout."""
    engine: EngineOptions = EngineOptions()  # noqa: RUF009 (frozen)
    """Precision, kernels and recomputation of the distributed model."""
    tolerance: float | None = None
    """Largest relative error; None: what rounding explains (:func:`parity_reference.tolerance`)."""
    objective: Objective = MilmItm()  # noqa: RUF009 (frozen)
    """Training objective."""

    def __post_init__(self) -> None:
        if self.micro_batches % self.layout.dp:
            raise UserError(
                f"{self.micro_batches} micro-batches cannot be shared by {self.layout.dp} replicas: some would not be compared"
            )

    def __str__(self) -> str:
        words = [*([self.objective.name] * (self.objective.name != MilmItm.name)), str(self.layout)]
        if self.model.hidden_dropout or self.model.attention_dropout:
            words.append("dropout")
        if self.engine.recompute != "none":
            words.append(f"recompute {self.engine.recompute}")
        if self.engine.dtype != "float32":
            words.append(self.engine.dtype)
        return ", ".join(words)


def matrix() -> list[Case]:
    """Legal combinations of {TP 1, 2} x {PP 1, 2} x {VPP 1, 2} x {SP} x {ZeRO 0..3}, with DP 2 each: 8 processes at most."""
    axes = itertools.product((1, 2), (1, 2), (1, 2), (False, True), ZERO_STAGES)
    cases = [Case(Layout(2, tp, pp, vpp, sp, zero)) for tp, pp, vpp, sp, zero in axes]
    return [case for case in cases if not any(case.layout.problems(case.model, case.micro_batches // case.layout.dp))]


def batches(case: Case, step: int, device: torch.device | str = "cpu") -> list[PaddedBatch[Tensor]]:
    """Global batch of a step, with synthetic captions and pictures of varying length; its third micro-batch has no captions."""
    rng = np.random.default_rng([case.seed, step])
    micro_batches = []
    for number in range(case.micro_batches):
        masking = MaskingOptions(captioning_ratio=0.0, text_dropout=1.0) if number == 2 else MaskingOptions()
        batch = BatchOptions(text_length=TEXT_LENGTH, pad_to_multiple_of=4)
        data = DataConfig("", [], order=StreamOptions(case.seed), masking=masking, batch=batch)
        block = made_up_block(rng, VOCABULARY, GRID, TEXT_LENGTH, number, case.size, str(step))
        micro_batches.append(case.objective.collate(data, VOCABULARY, GRID)([block]).tensors(device))
    return micro_batches
