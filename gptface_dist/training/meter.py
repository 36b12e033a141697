"""Throughput of a run, and the time of each part of a step."""

import time

import torch

from gptface_dist.engine.engine import Engine, StepResult
from gptface_dist.model.flops import peak_tflops
from gptface_dist.model.options import ModelOptions
from gptface_dist.parallel.layout import Layout
from gptface_dist.tokenizers.vocabulary import Vocabulary


class Meter:
    """Times the parts of a step and counts its tokens, samples and FLOPs.

    The parts are data (waiting for the loader), forward-backward (communication included) and optimizer. The meter never waits
    for a GPU: CUDA events mark the ends of parts, and reading the step's result has already waited for its gradients. On a GPU
    the update overlaps with reading the next step's data, so ``seconds/optimizer`` is that of the step before.
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
        """Start a step with its first part, data."""
        self._marks, self._events = [time.perf_counter()], []

    def mark(self) -> None:
        """End the present part and start the next one: first data, then forward-backward."""
        self._marks.append(time.perf_counter())
        if self._device.type == "cuda":
            self._events.append(_event())

    def end(self, result: StepResult) -> dict[str, float]:
        """End the step; returns its metrics: seconds, rates, TFLOP/s per rank, GiB, and MFU on known GPUs."""
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
        """Peak bytes so far: allocated on the GPU, or this process's resident set on a CPU."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
