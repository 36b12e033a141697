"""A step's micro-batches through the pipeline: megatron-core's schedules over the chunks of one pipeline rank."""

import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import torch
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from gptface_dist.data.batch import Batch
from gptface_dist.engine import deepspeed_patches
from gptface_dist.model.dropout import Masks
from gptface_dist.parallel import libraries
from gptface_dist.parallel.stage import Stage
from gptface_dist.sequence import IGNORE


class Chunks(nn.Module):
    """The model chunks of one pipeline rank under one engine."""

    def __init__(self, stages: list[Stage]):
        super().__init__()
        self.stages = nn.ModuleList(stages)

    def forward(self, turn: int, batch: Batch[Tensor] | None, scale: Tensor | None, masks: Masks | None = None) -> Any:
        """The ``turn``-th chunk on a micro-batch; without one, the scalar that hands over the tied words' gradient."""
        stage = cast(Stage, self.stages[turn])
        return stage.tied_scalar() if batch is None else stage(batch, scale, masks)


class Turn(nn.Module):
    """One model chunk as megatron-core's schedules want to see it."""

    def __init__(self, engine: Any, stage: Stage, turn: int, config: Any):
        super().__init__()
        # Kept out of this module's own submodules: the engine owns the parameters.
        self.__dict__.update(engine=engine, stage=stage)
        self.vp_stage: int | None = turn if config.virtual_pipeline_model_parallel_size else None
        self.turn, self.config, self.model_type = turn, config, ModelType.encoder_or_decoder

    def set_input_tensor(self, received: list[Tensor | None]) -> None:
        """Called by the schedule: what the chunk before this one sent."""
        self.__dict__["stage"].receive(received[0])

    def forward(self, batch: Batch[Tensor], scale: Tensor | None, masks: Masks | None = None) -> Any:
        """A micro-batch -> hidden states, or (loss, sums) on the last chunk."""
        engine = self.__dict__["engine"]
        output = engine(self.turn, batch, scale, masks)
        if self.__dict__["stage"].last:
            loss, sums = output
            return deepspeed_patches.begin_backward(loss, engine), sums
        return deepspeed_patches.begin_backward(output, engine)


def run(
    turns: list[Turn], batches: list[Batch[Tensor]], masks: list[Masks | None], scale: Tensor, forward_only: bool
) -> Tensor:
    """All micro-batches forward, and backward too unless ``forward_only``; gradients stay in the engine.

    ``masks`` say for each micro-batch what dropout drops, ``scale`` float32 [3] are the losses' factors. Returns this rank's
    sums float64 [3, 3]: zero but on the last stage.
    """
    length = max(batch.tokens.shape[1] for batch in batches)
    padded = [pad(batch, length) for batch in batches]
    iterators = [iter(zip(padded, masks, strict=True)) for _ in turns]
    with libraries.schedules():
        found = get_forward_backward_func()(
            forward_step_func=functools.partial(_forward_step, scale=scale),
            data_iterator=iterators if len(turns) > 1 else iterators[0],
            model=turns if len(turns) > 1 else turns[0],
            num_microbatches=len(padded),
            seq_length=length,
            micro_batch_size=len(batches[0].matched),
            forward_only=forward_only,
        )
    return sum(found, torch.zeros(3, 3, dtype=torch.float64, device=scale.device))


def pad(batch: Batch[Tensor], length: int) -> Batch[Tensor]:
    """The batch with more padding: the schedule wants one shape for a step's micro-batches."""
    more = length - batch.tokens.shape[1]
    if more == 0:
        return batch
    grow = functools.partial(nn.functional.pad, pad=(0, more))
    return replace(
        batch,
        padded=True,
        tokens=grow(batch.tokens),
        labels=grow(batch.labels, value=IGNORE),
        segments=grow(batch.segments),
        positions=nn.functional.pad(batch.positions, (0, 0, 0, more)),
    )


def _forward_step(batches: Iterator[tuple[Batch[Tensor], Masks | None]], model: Turn, scale: Tensor) -> Any:
    batch, masks = next(batches)
    output = model(batch, scale, masks)
    if not isinstance(output, tuple):
        return output, None
    loss, sums = output
    return loss, lambda loss: (loss, torch.ones((), dtype=torch.int), sums)
