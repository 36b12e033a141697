"""Learning rate schedules: functions of the step."""

import math
from dataclasses import dataclass

from gptface_dist.errors import UserError, check_one_of

SCHEDULES = ("cosine", "linear", "constant")


@dataclass(frozen=True)
class ScheduleOptions:
    """Linear warm-up, then one of three schedules."""

    name: str = "cosine"
    """``cosine`` or ``linear`` from the peak to the minimum; ``constant`` at the peak, then linear to the minimum."""
    warmup_steps: int = 100
    """Steps of linear warm-up from 0 to the peak (``optimizer.lr``)."""
    decay_steps: int = 0
    """With ``constant``: steps of linear decay at the end of the run."""
    min_lr_ratio: float = 0.1
    """Minimum learning rate, at the last step, relative to the peak."""

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
        """Refuse a run of ``steps`` steps that is shorter than warm-up and decay."""
        if self.warmup_steps + self.decay_steps > steps:
            raise UserError(
                f"schedule.warmup_steps {self.warmup_steps} + schedule.decay_steps {self.decay_steps} are more than the run's "
                f"{steps} steps: raise run.steps or lower them"
            )

    def factor(self, step: int, steps: int) -> float:
        """Learning rate of step ``step`` (0-based, of ``steps``) relative to the peak.

        The last step of warm-up reaches the peak, and the last step of the run the minimum, which later steps keep.
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
