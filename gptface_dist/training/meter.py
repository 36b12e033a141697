"""How fast a run goes: what a step worked on, and where its time went."""

import time

import torch

from gptface_dist.engine.engine import Engine, StepResult
from gptface_dist.model.flops import peak_tflops
from gptface_dist.model.options import ModelOptions
from gptface_dist.parallel.layout import Layout
from gptface_dist.tokenizers.vocabulary import Vocabulary


class Meter:
    """Times the parts of a step and counts its work.

    The parts are data (waiting for the loader), forward-backward (with the communication inside it) and optimizer. A GPU is
    not waited for: it notes itself when it comes to a part's end, and the step's result was read when its gradients were done.
    There the update runs while the host reads the next step's data, and ``seconds/optimizer`` is that of the step before.
    """

    def __init__(self, options: ModelOptions, vocabulary: Vocabulary, layout: Layout, dtype: str, engine: Engine):
        self._options, self._vocabulary, self._layout = options, vocabulary, layout
        self._objective, self._device = engine.objective, engine.device
        name = torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else ""
        self._peak = peak_tflops(name, dtype)
        self._marks: list[float] = []
        self._events: list[torch.cuda.Event] = []
        self._update: list[torch.cuda.Event] = []

    def begin(self) -> None:
        """A step begins: now waiting for data."""
        self._marks, self._events = [time.perf_counter()], []

    def mark(self) -> None:
        """The present part ends, the next begins: data, then forward-backward."""
        self._marks.append(time.perf_counter())
        if self._device.type == "cuda":
            self._events.append(_event())

    def end(self, result: StepResult) -> dict[str, float]:
        """The metrics of a step that ends now."""
        began, ready, computed = self._marks
        seconds, data = time.perf_counter() - began, ready - began
        compute, optimizer = computed - ready, began + seconds - computed
        if self._events:
            compute = self._events[0].elapsed_time(self._events[1]) / 1e3
            optimizer = self._update[0].elapsed_time(self._update[1]) / 1e3 if self._update else 0.0
            self._update = [self._events[1], _event()]
        flops = self._objective.flops(self._options, self._vocabulary, result.work)
        metrics = {
            "seconds": seconds,
            "seconds/data": data,
            "seconds/forward_backward": compute,
            "seconds/optimizer": optimizer,
            "tokens": result.work.tokens,
            "tokens_per_s": result.work.tokens / seconds,
            "samples_per_s": result.samples / seconds,
            "tflops_per_rank": flops / seconds / self._layout.world / 1e12,
            "peak_memory_gib": self._peak_memory() / 2**30,
        }
        if self._peak is not None:
            metrics["mfu"] = metrics["tflops_per_rank"] / self._peak
        return metrics

    def _peak_memory(self) -> int:
        """Bytes: the device's on a GPU, else this process's resident set."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
