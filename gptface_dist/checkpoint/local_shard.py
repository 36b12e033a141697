"""What a rank holds of a parameter and its optimizer state."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from gptface_dist.model.parameters import Parameter

WEIGHTS = "weights"
MOMENTS = ("moment1", "moment2")
AVERAGE = "average"


@dataclass(frozen=True)
class Region:
    """A contiguous range of one flattened tensor-parallel shard, in this rank's memory."""

    entry: Parameter
    """The parameter."""
    shard: tuple[int, ...]
    """Shape of this rank's tensor-parallel shard of it."""
    rank: int
    """Tensor-parallel rank."""
    size: int
    """Tensor-parallel ranks."""
    held: range
    """Elements of the flattened shard that are held here."""
    written: range
    """Those of them that this rank writes to a checkpoint: over all ranks, each element of a parameter once."""
    values: dict[str, Tensor]
    """Float32 [len(held)] each: ``weights``, the Adam moments ``moment1`` and ``moment2``, and ``average`` where one is
    kept. Views: writing to them changes the state.
    """


class State(Protocol):
    """A rank's part of the training state, as checkpoints see it."""

    updates: int
    """Optimizer updates done: AdamW corrects its moments' bias by it."""

    def regions(self) -> list[Region]:
        """All that this rank holds."""

    def refresh(self) -> None:
        """The regions were written to: bring what is computed with into agreement. All ranks call it."""

    def begin_average(self) -> None:
        """The running average begins anew, as the weights now are."""
