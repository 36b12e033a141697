"""Limits the resident memory of a run on a CPU."""

from gptface_dist import host
from gptface_dist.training.callbacks.callback import Callback
from gptface_dist.training.trainer import Trainer

EVERY = 20
"""Steps between trims: a trim takes some milliseconds, and a step of the tiny model leaves some 20 MB."""


class HostMemory(Callback):
    """Returns freed memory to the system at an interval: batches of varying lengths leave unused memory behind."""

    def after_step(self, run: Trainer, metrics: dict[str, float]) -> None:
        """Trim after every :data:`EVERY` steps if tensors are in host memory."""
        if run.engine.device.type == "cpu" and run.state.step % EVERY == 0:
            host.trim_host_memory()
