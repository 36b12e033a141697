"""Keeps a run's resident memory where it begins, on a CPU, where tensors live in it."""

from gptface_dist import host
from gptface_dist.training.callbacks.callback import Callback
from gptface_dist.training.trainer import Trainer

EVERY = 20
"""Steps between two times: it takes some milliseconds, and a step of the tiny model leaves some 20 MB."""


class HostMemory(Callback):
    """Hands freed memory back now and then: batches have other lengths each step."""

    def after_step(self, run: Trainer, metrics: dict[str, float]) -> None:
        """After every EVERY steps, where tensors are in host memory."""
        if run.engine.device.type == "cpu" and run.state.step % EVERY == 0:
            host.trim_host_memory()
