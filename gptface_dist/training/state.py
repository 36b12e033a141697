"""Where a run stands, but for weights and optimizer."""

from dataclasses import dataclass, field
from typing import Any

from gptface_dist.data.loader import Position


@dataclass
class TrainState:
    """Where a run stands, but for weights and optimizer: what a checkpoint writes beside them."""

    step: int = 0
    """Optimizer steps done."""
    position: Position | None = None
    """Where the data of the next step begins; None at the very beginning."""
    samples: int = 0
    """Samples trained on, over all ranks."""
    tokens: int = 0
    """Tokens trained on, over all ranks; padding is not counted."""
    seconds: float = 0.0
    """Time spent in training steps."""
    callbacks: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What each callback keeps (``Callback.state``), by the name of its class."""
