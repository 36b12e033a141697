"""Base of the training loop's callbacks: checkpoints, guards, tracking and so on.

Every rank calls the same callbacks in the same order, so a callback may communicate; one for a single rank checks
``run.rank_info.rank``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gptface_dist.engine.engine import StepResult
    from gptface_dist.training.trainer import Trainer


class Callback:
    """Does nothing; subclasses override methods. ``metrics`` maps names to the step's values."""

    def start(self, run: Trainer) -> None:
        """The engine exists; callbacks before this one may have loaded weights and state.

        May refuse the run by :class:`UserError`, and writes no file: another rank or callback may refuse it still.
        """

    def begin(self, run: Trainer) -> None:
        """Every rank has started, and has the data of its first step: files may be written from here on."""

    def before_step(self, run: Trainer) -> None:
        """A step is about to begin; ``run.state.step`` steps are done."""

    def before_update(self, run: Trainer, result: StepResult) -> None:
        """The step's gradients are complete; weights and optimizer state have not changed yet.

        May call ``run.skip_update(reason)`` or ``run.scale_update(factor)``; all ranks must do the same. ``result`` is in host
        memory: reading it does not wait for the device.
        """

    def after_step(self, run: Trainer, metrics: dict[str, float]) -> None:
        """A step is done and counted in ``run.state.step``. May add metrics; may call ``run.stop(reason)``."""

    def after_evaluation(self, run: Trainer, metrics: dict[str, float]) -> None:
        """An evaluation on held-out data is done."""

    def stop(self, run: Trainer) -> None:
        """The loop has ended regularly: all steps are done, or a callback stopped the run."""

    def close(self, run: Trainer) -> None:
        """The run ends, also by an error: release resources. Must not communicate."""

    def state(self) -> dict[str, Any]:
        """State to save in checkpoints, as JSON values."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Load the saved result of :meth:`state`; called only in a resumed run, by ``Checkpointing.start``."""
