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
    """With ``constant``: steps of linear decay at the schedule's end."""
    min_lr_ratio: float = 0.1
    """Minimum learning rate, at the schedule's last step, relative to the peak; later steps keep it."""
    total_steps: int = 0
    """Length of the schedule; 0: ``run.steps`` when the run first starts. A resumed run keeps it, whatever ``run.steps`` is
    then, so that a run may end early and go on later."""

    def __post_init__(self) -> None:
        check_one_of("schedule.name", self.name, SCHEDULES)
        for option in ("warmup_steps", "decay_steps", "total_steps"):
            if getattr(self, option) < 0:
                raise UserError(f"schedule.{option} must be 0 or more, got {getattr(self, option)}")
        if self.decay_steps and self.name != "constant":
            raise UserError(f"schedule.decay_steps belongs to name=constant; {self.name} decays all the way: set it to 0")
        if not 0 <= self.min_lr_ratio <= 1:
            raise UserError(f"schedule.min_lr_ratio is a share of the peak, between 0 and 1; got {self.min_lr_ratio}")

    def check(self, steps: int) -> None:
        """Refuse a schedule of ``steps`` steps that is shorter than its warm-up and decay."""
        if self.warmup_steps + self.decay_steps > steps:
            raise UserError(
                f"schedule.warmup_steps {self.warmup_steps} + schedule.decay_steps {self.decay_steps} are more than the "
                f"schedule's {steps} steps: raise schedule.total_steps or run.steps, or lower them"
            )

    def factor(self, step: int, steps: int) -> float:
        """Learning rate of step ``step`` (0-based) of a schedule of ``steps`` steps, relative to the peak.

        The last step of warm-up reaches the peak, and the last step of the schedule the minimum, which later steps keep.
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
