"""What may happen at the named moments of a run: checkpoints, guards, tracking and so on are callbacks, not branches.

Every rank calls every callback at the same moments in the same order, so a callback may communicate; one that must act on one
rank alone asks ``run.rank_info.rank``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gptface_dist.engine.engine import StepResult
    from gptface_dist.training.trainer import Trainer


class Callback:
    """Base of all callbacks: does nothing. ``metrics`` holds the step's metrics by name."""

    def start(self, run: Trainer) -> None:
        """The engine exists, and weights and position are those the run resumes from."""

    def before_step(self, run: Trainer) -> None:
        """A step is about to begin; ``run.state.step`` steps are done."""

    def before_update(self, run: Trainer, result: StepResult) -> None:
        """The step's gradients are complete, and nothing has changed yet.

        May call ``run.skip_update(reason)`` or ``run.scale_update(factor)``; all ranks must do the same. ``result`` is in host
        memory: looking at it does not wait for the device.
        """

    def after_step(self, run: Trainer, metrics: dict[str, float]) -> None:
        """A step is done and counted in ``run.state.step``. May add metrics; may call ``run.stop(reason)``."""

    def after_evaluation(self, run: Trainer, metrics: dict[str, float]) -> None:
        """An evaluation on held-out data is done."""

    def stop(self, run: Trainer) -> None:
        """The loop has ended as it should: all steps are done, or a callback asked to stop."""

    def close(self, run: Trainer) -> None:
        """The run ends, well or badly: release resources. Must not communicate."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint should keep of this callback, as JSON."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Resume from what :meth:`state` gave."""
