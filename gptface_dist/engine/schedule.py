"""A step's micro-batches through the pipeline: megatron-core's schedules over the chunks of one pipeline rank."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from gptface_dist.engine import deepspeed_patches
from gptface_dist.model.dropout import Masks
from gptface_dist.parallel import libraries
from gptface_dist.parallel.stage import Finish, Stage
from gptface_dist.sequence import PaddedBatch


@dataclass(frozen=True)
class MicroBatch:
    """Input of the schedule for one micro-batch."""

    batch: PaddedBatch[Tensor]
    """Padded sequences."""
    finish: Finish
    """Function of the last chunk from features to loss and collected outputs."""
    masks: Masks | None = None
    """Dropout masks; None: no dropout."""


class ModelChunks(nn.Module):
    """The model chunks of one pipeline rank under one engine."""

    def __init__(self, stages: list[Stage]):
        super().__init__()
        self.stages = nn.ModuleList(stages)

    def forward(self, vp_stage: int, micro_batch: MicroBatch | None) -> Any:
        """Run chunk ``vp_stage`` on a micro-batch; without one, return its scalar for the tied gradient (``TiedScalar``)."""
        stage = cast(Stage, self.stages[vp_stage])
        if micro_batch is None:
            return stage.tied_scalar()
        return stage(micro_batch.batch, micro_batch.finish, micro_batch.masks)


class ModelChunk(nn.Module):
    """Adapter of one model chunk to the interface of megatron-core's schedules."""

    def __init__(self, engine: Any, stage: Stage, vp_stage: int, config: Any):
        super().__init__()
        # Not as submodules: the engine owns the parameters.
        self.__dict__.update(engine=engine, stage=stage)
        self.vp_stage: int | None = vp_stage if config.virtual_pipeline_model_parallel_size else None
        self.number, self.config, self.model_type = vp_stage, config, ModelType.encoder_or_decoder

    def set_input_tensor(self, received: list[Tensor | None]) -> None:
        """Set the output of the previous chunk; called by the schedule."""
        self.__dict__["stage"].receive(received[0])

    def forward(self, micro_batch: MicroBatch) -> Any:
        """A micro-batch -> hidden states; on the last chunk the result of ``micro_batch.finish``."""
        engine = self.__dict__["engine"]
        output = engine(self.number, micro_batch)
        if self.__dict__["stage"].last:
            loss, collected = output
            return deepspeed_patches.begin_backward(loss, engine), collected
        return deepspeed_patches.begin_backward(output, engine)


def run(model_chunks: list[ModelChunk], micro_batches: list[MicroBatch], forward_only: bool) -> list[Any]:
    """Run all micro-batches forward, and backward unless ``forward_only``; gradients accumulate in the engine.

    Returns the collected outputs of each micro-batch, in order, on the last stage; an empty list on the others.
    """
    length = max(each.batch.length for each in micro_batches)
    padded = [replace(each, batch=each.batch.padded_to(length)) for each in micro_batches]
    iterators = [iter(padded) for _ in model_chunks]
    with libraries.schedules():
        collected: list[Any] = get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=iterators if len(model_chunks) > 1 else iterators[0],
            model=model_chunks if len(model_chunks) > 1 else model_chunks[0],
            num_microbatches=len(padded),
            seq_length=length,
            micro_batch_size=padded[0].batch.rows,
            forward_only=forward_only,
        )
    return collected


def _forward_step(micro_batches: Iterator[MicroBatch], model: ModelChunk) -> Any:
    output = model(next(micro_batches))
    if not isinstance(output, tuple):
        return output, None
    loss, collected = output
    return loss, lambda loss: (loss, torch.ones((), dtype=torch.int), collected)
