"""Functions of the last stage, from a micro-batch's features to (loss to differentiate, outputs to collect)."""

import torch
from torch import Tensor

from gptface_dist.model.reference_batch import ReferenceBatch
from gptface_dist.objectives.objective import CoupledObjective, Heads, Objective
from gptface_dist.sequence import PaddedBatch


def losses(
    objective: Objective, scale: Tensor, constants: dict[str, Tensor], x_BLH: Tensor, batch: PaddedBatch[Tensor], heads: Heads
) -> tuple[Tensor, Tensor]:
    """Sum of the terms' losses times ``scale`` float32 [terms]; collects float64 [terms, 3] of (loss, correct, count)."""
    losses = objective.losses(x_BLH, batch, heads, constants)
    total = sum((each.loss * scale[i] for i, each in enumerate(losses)), torch.zeros((), device=scale.device))
    rows = [(each.loss, each.correct, each.loss.new_full((), each.items, dtype=torch.float64)) for each in losses]
    return total, torch.stack([torch.stack([part.detach().double() for part in row]) for row in rows])


def survey(
    objective: CoupledObjective, x_BLH: Tensor, batch: PaddedBatch[Tensor], heads: Heads
) -> tuple[Tensor, dict[str, Tensor]]:
    """Zero loss; collects the objective's survey of the micro-batch by name."""
    return x_BLH.new_zeros(()), objective.survey(x_BLH, batch, heads)


def reference_outputs(
    objective: Objective, x_BLH: Tensor, batch: ReferenceBatch, heads: Heads
) -> tuple[Tensor, dict[str, Tensor]]:
    """Zero loss; collects the heads' outputs by name."""
    return x_BLH.new_zeros(()), objective.reference_outputs(x_BLH, batch, heads)
