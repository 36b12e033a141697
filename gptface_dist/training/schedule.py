"""The learning rate as a function of the step."""

import math
from dataclasses import dataclass

from gptface_dist.errors import UserError, check_one_of

SHAPES = ("cosine", "linear", "constant")


@dataclass(frozen=True)
class ScheduleOptions:
    """Warm-up, then one of three shapes."""

    shape: str = "cosine"
    """``cosine`` or ``linear`` from the peak to the floor; ``constant`` at the peak, then linear to the floor at the end."""
    warmup: int = 100
    """Steps of linear growth from 0 to the peak (``optimizer.lr``)."""
    decay: int = 0
    """With ``constant``: steps of decay at the end."""
    floor: float = 0.1
    """Last learning rate, as a share of the peak."""

    def __post_init__(self) -> None:
        check_one_of("schedule.shape", self.shape, SHAPES)
        if self.warmup < 0 or self.decay < 0:
            raise UserError(f"schedule.warmup and schedule.decay must be 0 or more, got {self.warmup} and {self.decay}")
        if self.decay and self.shape != "constant":
            raise UserError(f"schedule.decay belongs to shape=constant; {self.shape} decays all the way: set it to 0")
        if not 0 <= self.floor <= 1:
            raise UserError(f"schedule.floor is a share of the peak, between 0 and 1; got {self.floor}")

    def check(self, steps: int) -> None:
        """Refuse a run too short for its warm-up and decay."""
        if self.warmup + self.decay > steps:
            raise UserError(
                f"schedule.warmup {self.warmup} + schedule.decay {self.decay} are more than the run's {steps} steps: "
                "raise run.steps or lower them"
            )

    def factor(self, step: int, steps: int) -> float:
        """Learning rate of step ``step`` (0 is the first of ``steps``), as a share of the peak.

        The last step of warm-up has the peak; the last step of the run has the floor, which later ones keep.
        """
        step = min(step, steps - 1)
        if step < self.warmup:
            return (step + 1) / self.warmup
        start = steps - self.decay if self.shape == "constant" else self.warmup
        if step < start:
            return 1.0
        done = (step + 1 - start) / (steps - start)
        if self.shape == "cosine":
            return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * done))
        return self.floor + (1 - self.floor) * (1 - done)
