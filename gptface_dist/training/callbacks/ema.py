"""The exponential moving average of the weights."""

from gptface_dist.training.callbacks.callback import Callback
from gptface_dist.training.trainer import Trainer


class EMA(Callback):
    """Keeps an EMA of the master weights, with their device and sharding; checkpoints save it.

    It comes before :class:`Checkpointing`, which overwrites the initial EMA with a saved one.
    """

    def __init__(self, decay: float):
        self._decay = decay

    def start(self, run: Trainer) -> None:
        """Start from the present weights."""
        if self._decay:
            run.engine.state.begin_ema()

    def after_step(self, run: Trainer, metrics: dict[str, float]) -> None:
        """Update the EMA, unless the step's update was skipped."""
        if self._decay and run.update_factor:
            run.engine.state.update_ema(self._decay)
