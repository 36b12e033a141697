"""A rank's shard of a parameter and of its optimizer state."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from gptface_dist.model.parameters import ParameterSpec

WEIGHTS = "weights"
MOMENTS = ("exp_avg", "exp_avg_sq")
EMA = "ema"


@dataclass(frozen=True)
class LocalShard:
    """A contiguous range of one flattened tensor-parallel shard, in this rank's memory."""

    entry: ParameterSpec
    """Table entry of the parameter."""
    shard: tuple[int, ...]
    """Shape of this rank's tensor-parallel shard of it."""
    rank: int
    """Tensor-parallel rank."""
    size: int
    """Number of tensor-parallel ranks."""
    local_range: range
    """Elements of the flattened shard in this rank's memory."""
    owned_range: range
    """The part of ``local_range`` that this rank saves: over all ranks, each element of a parameter once."""
    values: dict[str, Tensor]
    """Float32 [len(local_range)] each: ``weights``, the Adam moments ``exp_avg`` and ``exp_avg_sq``, and ``ema`` if the run
    keeps one. Views: writing to them changes the state.
    """


class OptimizerStateView(Protocol):
    """A rank's part of the training state: the interface between engine and checkpoints."""

    updates: int
    """Optimizer updates done, the step count of AdamW's bias correction."""

    def local_shards(self) -> list[LocalShard]:
        """All shards in this rank's memory, as views."""

    def refresh(self) -> None:
        """Update the model's weights after writes to the local shards. Collective."""

    def begin_ema(self) -> None:
        """Start the EMA from the present weights."""
