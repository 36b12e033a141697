"""What the last stage does with a micro-batch's features: (loss to differentiate, what is collected)."""

import torch
from torch import Tensor

from gptface_dist.model.reference_batch import ReferenceBatch
from gptface_dist.objectives.objective import Heads, Objective
from gptface_dist.sequence import PaddedBatch


def losses(
    objective: Objective, scale: Tensor, constants: dict[str, Tensor], x_BLH: Tensor, batch: PaddedBatch[Tensor], heads: Heads
) -> tuple[Tensor, Tensor]:
    """``scale`` float32 [terms] are the factors of the summed losses; collects float64 [terms, 3] (loss, correct, count)."""
    losses = objective.losses(x_BLH, batch, heads, constants)
    total = sum((each.loss * scale[i] for i, each in enumerate(losses)), torch.zeros((), device=scale.device))
    rows = [(each.loss, each.correct, each.loss.new_full((), each.items, dtype=torch.float64)) for each in losses]
    return total, torch.stack([torch.stack([part.detach().double() for part in row]) for row in rows])


def survey(objective: Objective, x_BLH: Tensor, batch: PaddedBatch[Tensor], heads: Heads) -> tuple[Tensor, dict[str, Tensor]]:
    """Collects the objective's survey of the micro-batch."""
    return x_BLH.new_zeros(()), objective.survey(x_BLH, batch, heads)


def reference_outputs(
    objective: Objective, x_BLH: Tensor, batch: ReferenceBatch, heads: Heads
) -> tuple[Tensor, dict[str, Tensor]]:
    """Collects the heads' outputs."""
    return x_BLH.new_zeros(()), objective.reference_outputs(x_BLH, batch, heads)
