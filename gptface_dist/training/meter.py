"""How fast a run goes: what a step worked on, and where its time went."""

import time

import torch
import torch.distributed as dist
from torch import Tensor

from gptface_dist.data.batch import Batch
from gptface_dist.layout import Layout
from gptface_dist.model.options import ModelOptions
from gptface_dist.tokenizers.vocabulary import Vocabulary
from gptface_dist.training.flops import Work, model_flops, peak_tflops


class Meter:
    """Times the parts of a step and counts its work.

    The parts are data (waiting for the loader), forward-backward (with the communication inside it) and optimizer. On a
    GPU the parts' ends wait for the device, twice a step.
    """

    def __init__(self, options: ModelOptions, vocabulary: Vocabulary, layout: Layout, dtype: str, device: torch.device):
        self._options, self._vocabulary, self._layout, self._device = options, vocabulary, layout, device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        self._peak = peak_tflops(name, dtype)
        self._marks: list[float] = []
        self.samples = 0
        """Sequences of the last step, over all ranks."""
        self.tokens = 0
        """Their tokens, without padding."""

    def begin(self) -> None:
        """A step begins: now waiting for data."""
        self._marks = [time.perf_counter()]

    def mark(self) -> None:
        """The present part ends, the next begins."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._marks.append(time.perf_counter())

    def end(self, batches: list[Batch[Tensor]], sums: Tensor, data_group: dist.ProcessGroup) -> dict[str, float]:
        """The step's metrics; ``sums`` as in :class:`StepResult`, ``batches`` this rank's micro-batches."""
        self.mark()
        lengths = torch.cat([batch.lengths for batch in batches]).double()
        work = torch.stack([lengths.sum(), (lengths**2).sum(), lengths.new_tensor(len(lengths))])
        dist.all_reduce(work, group=data_group)
        tokens, pairs, self.samples = (int(x) for x in work)
        self.tokens = tokens
        data, compute, optimizer = (b - a for a, b in zip(self._marks, self._marks[1:], strict=False))
        seconds = self._marks[-1] - self._marks[0]
        ids = self._vocabulary
        text, image, _ = (int(x) for x in sums[:, 2])
        done = Work(tokens, pairs, text, image, self.samples)
        flops = model_flops(self._options, len(ids.text_range), len(ids.image_range), done)
        record = {
            "seconds": seconds,
            "seconds/data": data,
            "seconds/forward_backward": compute,
            "seconds/optimizer": optimizer,
            "tokens": tokens,
            "tokens_per_s": tokens / seconds,
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
