"""The learning rate as a function of the step."""

import math
from dataclasses import dataclass

from gptface_dist.errors import UserError, check_one_of

SCHEDULES = ("cosine", "linear", "constant")


@dataclass(frozen=True)
class ScheduleOptions:
    """Warm-up, then one of three shapes."""

    name: str = "cosine"
    """``cosine`` or ``linear`` from the peak to the least; ``constant`` at the peak, then linear to the least at the end."""
    warmup_steps: int = 100
    """Steps of linear growth from 0 to the peak (``optimizer.lr``)."""
    decay_steps: int = 0
    """With ``constant``: steps of decay at the end."""
    min_lr_ratio: float = 0.1
    """Last learning rate, as a share of the peak."""

    def __post_init__(self) -> None:
        check_one_of("schedule.name", self.name, SCHEDULES)
        if self.warmup_steps < 0 or self.decay_steps < 0:
            steps = f"{self.warmup_steps} and {self.decay_steps}"
            raise UserError(f"schedule.warmup_steps and schedule.decay_steps must be 0 or more, got {steps}")
        if self.decay_steps and self.name != "constant":
            raise UserError(f"schedule.decay_steps belongs to name=constant; {self.name} decays all the way: set it to 0")
        if not 0 <= self.min_lr_ratio <= 1:
            raise UserError(f"schedule.min_lr_ratio is a share of the peak, between 0 and 1; got {self.min_lr_ratio}")

    def check(self, steps: int) -> None:
        """Refuse a run too short for its warm-up and decay."""
        if self.warmup_steps + self.decay_steps > steps:
            raise UserError(
                f"schedule.warmup_steps {self.warmup_steps} + schedule.decay_steps {self.decay_steps} are more than the run's "
                f"{steps} steps: raise run.steps or lower them"
            )

    def factor(self, step: int, steps: int) -> float:
        """Learning rate of step ``step`` (0 is the first of ``steps``), as a share of the peak.

        The last step of warm-up has the peak; the last step of the run has the least, which later ones keep.
        """
        step = min(step, steps - 1)
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        start = steps - self.decay_steps if self.name == "constant" else self.warmup_steps
        if step < start:
            return 1.0
        done = (step + 1 - start) / (steps - start)
        if self.name == "cosine":
            return self.min_lr_ratio + (1 - self.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * done))
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * (1 - done)
