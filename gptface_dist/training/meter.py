"""How fast a run goes: what a step worked on, and where its time went."""

import time

import torch
from torch import Tensor

from gptface_dist.engine.engine import StepResult
from gptface_dist.model.flops import Work, model_flops, peak_tflops
from gptface_dist.model.options import ModelOptions
from gptface_dist.parallel.layout import Layout
from gptface_dist.tokenizers.vocabulary import Vocabulary


class Meter:
    """Times the parts of a step and counts its work.

    The parts are data (waiting for the loader), forward-backward (with the communication inside it) and optimizer. A GPU is
    not waited for: it notes itself when it comes to a part's end, and the step's result was read when it was done.
    """

    def __init__(self, options: ModelOptions, vocabulary: Vocabulary, layout: Layout, dtype: str, device: torch.device):
        self._options, self._vocabulary, self._layout, self._device = options, vocabulary, layout, device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        self._peak = peak_tflops(name, dtype)
        self._marks: list[float] = []
        self._events: list[torch.cuda.Event] = []
        self.samples = 0
        """Sequences of the last step, over all ranks."""
        self.tokens = 0
        """Their tokens, without padding."""

    def begin(self) -> None:
        """A step begins: now waiting for data."""
        self._marks, self._events = [time.perf_counter()], []

    def mark(self) -> None:
        """The present part ends, the next begins: data, then forward-backward."""
        self._marks.append(time.perf_counter())
        if self._device.type == "cuda":
            self._events.append(torch.cuda.Event(enable_timing=True))
            self._events[-1].record()

    def end(self, result: StepResult) -> dict[str, float]:
        """The metrics of a step that ends now."""
        began, ready, computed = self._marks
        seconds, data = time.perf_counter() - began, ready - began
        compute = self._events[0].elapsed_time(self._events[1]) / 1e3 if self._events else computed - ready
        ids = self._vocabulary
        text, image, self.samples = (int(x) for x in result.sums[:, 2])
        self.tokens = result.tokens
        done = Work(result.tokens, result.pairs, text, image, self.samples)
        flops = model_flops(self._options, len(ids.text_range), len(ids.image_range), done)
        record = {
            "seconds": seconds,
            "seconds/data": data,
            "seconds/forward_backward": compute,
            "seconds/optimizer": seconds - data - compute,
            "tokens": self.tokens,
            "tokens_per_s": self.tokens / seconds,
            "samples_per_s": self.samples / seconds,
            "tflops_per_rank": flops / seconds / self._layout.world / 1e12,
            "peak_memory_gib": self._peak_memory() / 2**30,
        }
        if self._peak is not None:
            record["mfu"] = record["tflops_per_rank"] / self._peak
        return record

    def _peak_memory(self) -> int:
        """Bytes: the device's on a GPU, else this process's resident set."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def loss_metrics(sums: Tensor) -> dict[str, float]:
    """Mean losses (nats) and accuracies of ``sums`` [3, 3]; those without anything supervised are left out."""
    record: dict[str, float] = {}
    for name, (loss, correct, count) in zip(("text", "image", "match"), sums.tolist(), strict=True):
        if count:
            record |= {f"loss/{name}": loss / count, f"accuracy/{name}": correct / count}
    return record
