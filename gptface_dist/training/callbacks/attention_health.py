"""Error of FP8 attention during a run, layer by layer; layers above a limit fall back to the activations' precision."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from gptface_dist.differences import largest
from gptface_dist.engine.attention import AttentionRecorder, without_fp8
from gptface_dist.kernels.attention.health import Health
from gptface_dist.training.analysis.attention_report import LayerReport, entries
from gptface_dist.training.callbacks.callback import Callback
from gptface_dist.training.options import AttentionHealthOptions

if TYPE_CHECKING:
    from gptface_dist.training.trainer import Trainer

log = logging.getLogger(__name__)


class AttentionHealth(Callback):
    """At an interval, adds a report on each layer to the step's metrics (:func:`attention_report.entries`).

    It records the attention inputs of the step itself. It comes after :class:`Checkpointing`, whose forward pass for the
    reference outputs must not be recorded, and before the callbacks that read the metrics.
    """

    def __init__(self, options: AttentionHealthOptions):
        self._options = options
        self._fallen: list[int] = []
        self._recorder: AttentionRecorder | None = None

    def start(self, run: Trainer) -> None:
        """Apply the fallbacks of a resumed run, or drop them without a limit."""
        if self._options.fall_back is None:
            self._fallen = []
        for layer in self._fallen:
            without_fp8(run.engine, layer)

    def before_step(self, run: Trainer) -> None:
        """Start recording if the step is due for a report."""
        if self._options.interval and (run.state.step + 1) % self._options.interval == 0:
            self._recorder = AttentionRecorder(run.engine, self._options.sequences)
            self._recorder.begin()

    def after_step(self, run: Trainer, metrics: dict[str, float]) -> None:
        """Add the reports to ``metrics``, and let layers fall back; the same on every rank."""
        if self._recorder is None:
            return
        layers = self._recorder.end(run.config.engine.attention.fp8)
        self._recorder = None
        for layer, health in layers.items():
            self._judge(run, layer, health)
            tensors = {name: (shares.saturated, shares.flushed) for name, shares in health.shares.items()}
            report = LayerReport(health.out_error, health.gradient_error, layer in self._fallen, tensors)
            metrics |= entries(layer, report)

    def _judge(self, run: Trainer, layer: int, health: Health) -> None:
        limit, error = self._options.fall_back, largest([health.out_error, health.gradient_error or 0.0])
        if limit is None or layer in self._fallen or error <= limit:
            return
        self._fallen.append(layer)
        without_fp8(run.engine, layer)
        if run.rank_info.rank == 0:
            log.warning(
                "step %d: attention of layer %d goes on without FP8: its error against bf16 is %.3f, above "
                "attention_health.fall_back %g",
                run.state.step,
                layer,
                error,
                limit,
            )

    def state(self) -> dict[str, Any]:
        """Layers of the whole model that fell back."""
        return {"fallen_back": self._fallen}

    def restore(self, state: dict[str, Any]) -> None:
        """Applied in :meth:`start`."""
        self._fallen = list(state["fallen_back"])
