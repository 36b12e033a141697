"""What may happen at the named moments of a run: checkpoints, guards, tracking and so on are hooks, not branches.

Every rank calls every hook at the same moments in the same order, so a hook may communicate; one that must act on one
rank alone asks ``run.processes``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gptface_dist.training.trainer import Trainer


class Hook:
    """Base of all hooks: does nothing. ``record`` holds the step's metrics by name."""

    def start(self, run: Trainer) -> None:
        """The engine exists, and weights and position are those the run goes on from."""

    def before_step(self, run: Trainer) -> None:
        """A step is about to begin; ``run.state.step`` steps are done."""

    def after_step(self, run: Trainer, record: dict[str, float]) -> None:
        """A step is done and counted in ``run.state.step``. May add to the record; may call ``run.stop(reason)``."""

    def after_evaluation(self, run: Trainer, record: dict[str, float]) -> None:
        """An evaluation on held-out data is done."""

    def stop(self, run: Trainer) -> None:
        """The loop has ended as it should: all steps are done, or a hook asked to stop."""

    def close(self, run: Trainer) -> None:
        """The run ends, well or badly: release what is held. Must not communicate."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint should keep of this hook, as JSON."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state` gave."""
