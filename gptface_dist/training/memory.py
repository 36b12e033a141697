"""Hands memory that the C library has freed back to the system: on a CPU, where tensors live in it."""

import ctypes
import ctypes.util

from gptface_dist.training.hook import Hook
from gptface_dist.training.trainer import Trainer

EVERY = 20
"""Steps between two times: a trim takes some milliseconds, and a step of the tiny model leaves some 20 MB."""


class HostMemory(Hook):
    """Batches have other lengths each step, and glibc keeps the blocks of all of them: resident memory would grow to several
    times what is in use (docs/notes.md). Does nothing on a GPU, or where the C library has no ``malloc_trim``.
    """

    def start(self, run: Trainer) -> None:
        """Find the function."""
        name = ctypes.util.find_library("c") if run.engine.device.type == "cpu" else None
        self._trim = getattr(ctypes.CDLL(name), "malloc_trim", None) if name else None

    def after_step(self, run: Trainer, record: dict[str, float]) -> None:
        """Trim now and then."""
        if self._trim is not None and run.state.step % EVERY == 0:
            self._trim(0)
