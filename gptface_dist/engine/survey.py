"""The first of two passes of a coupled objective: a forward pass of the global batch, from which its constants come."""

import functools

import torch
import torch.distributed as dist
from megatron.core import parallel_state as groups
from torch import Tensor

from gptface_dist.engine import last_stage, schedule
from gptface_dist.engine.schedule import MicroBatch, ModelChunk
from gptface_dist.model.dropout import Masks
from gptface_dist.objectives.objective import CoupledObjective
from gptface_dist.sequence import PaddedBatch


@torch.no_grad()
def survey(
    objective: CoupledObjective, chunks: list[ModelChunk], batches: list[PaddedBatch[Tensor]], masks: list[Masks | None]
) -> list[dict[str, Tensor]]:
    """The objective's constants for each micro-batch, on the last stage; empty on the others. Collective.

    Outputs are gathered over data-parallel ranks in the order of ranks, which is that of samples: each rank has consecutive
    samples of the global batch.
    """
    finish = functools.partial(last_stage.survey, objective)
    micro_batches = [MicroBatch(batch, finish, drop) for batch, drop in zip(batches, masks, strict=True)]
    outputs = schedule.run(chunks, micro_batches, forward_only=True)
    if not outputs:
        return [{} for _ in batches]
    local = {name: torch.cat([output[name] for output in outputs]) for name in outputs[0]}
    surveyed = {name: _gather(part) for name, part in local.items()}
    sizes = [batch.samples for batch in batches]
    first = groups.get_data_parallel_rank() * sum(sizes)
    constants = objective.constants(surveyed, slice(first, first + sum(sizes)))
    split = {name: part.split(sizes) for name, part in constants.items()}
    return [{name: parts[number] for name, parts in split.items()} for number in range(len(batches))]


def _gather(part: Tensor) -> Tensor:
    """[n, ..] of each data-parallel rank -> [ranks * n, ..]."""
    group = groups.get_data_parallel_group()
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, part.contiguous(), group=group)
    return torch.cat(parts)
