"""Progress of a run, without weights and optimizer state."""

from dataclasses import dataclass, field
from typing import Any

from gptface_dist.data.loader import Position


@dataclass
class TrainState:
    """Progress of a run, without weights and optimizer state; checkpoints save it as JSON."""

    step: int = 0
    """Optimizer steps done."""
    position: Position | None = None
    """Position in the data of the next step; None before the first step."""
    samples: int = 0
    """Samples trained on, over all ranks."""
    tokens: int = 0
    """Tokens trained on, over all ranks, without padding."""
    seconds: float = 0.0
    """Seconds spent in training steps."""
    callbacks: dict[str, dict[str, Any]] = field(default_factory=dict)
    """States of callbacks (``Callback.state``) by class name."""
