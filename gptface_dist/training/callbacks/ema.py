"""The exponential moving average of the weights."""

from gptface_dist.training.callbacks.callback import Callback
from gptface_dist.training.trainer import Trainer


class EMA(Callback):
    """Keeps the average where the weights are, sharded as they are; checkpoints write it beside them.

    It stands before the callback that loads a checkpoint, which overwrites what begins here.
    """

    def __init__(self, decay: float):
        self._decay = decay

    def start(self, run: Trainer) -> None:
        """Begin with the weights as they now are."""
        if self._decay:
            run.engine.state.begin_ema()

    def after_step(self, run: Trainer, metrics: dict[str, float]) -> None:
        """Move the average, unless the step's update was skipped."""
        if self._decay and run.update_factor:
            run.engine.state.update_ema(self._decay)
