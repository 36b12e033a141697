"""What a rank holds of a parameter and its optimizer state."""

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
    """The parameter."""
    shard: tuple[int, ...]
    """Shape of this rank's tensor-parallel shard of it."""
    rank: int
    """Tensor-parallel rank."""
    size: int
    """Tensor-parallel ranks."""
    local_range: range
    """Elements of the flattened shard that are held here."""
    owned_range: range
    """Those of them that this rank writes to a checkpoint: over all ranks, each element of a parameter once."""
    values: dict[str, Tensor]
    """Float32 [len(local_range)] each: ``weights``, the Adam moments ``exp_avg`` and ``exp_avg_sq``, and ``ema`` where one is
    kept. Views: writing to them changes the state.
    """


class OptimizerStateView(Protocol):
    """A rank's part of the training state, as checkpoints see it."""

    updates: int
    """Optimizer updates done: AdamW corrects its moments' bias by it."""

    def local_shards(self) -> list[LocalShard]:
        """All that this rank holds."""

    def refresh(self) -> None:
        """The local_shards were written to: bring what is computed with into agreement. All ranks call it."""

    def begin_ema(self) -> None:
        """The running average begins anew, as the weights now are."""
