"""Time and memory of the chunked output loss, against a loss with the full logits tensor."""

import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from gptface_dist.kernels.loss.cross_entropy import linear_cross_entropy

WHOLE = "whole logits"


@dataclass(frozen=True)
class Work:
    """Sizes of the output layer's work on one batch."""

    rows: int
    """Number of masked tokens."""
    columns: int
    """Number of ids."""
    hidden: int
    """Width of the features."""
    dtype: str
    """Dtype of features and weights, as torch names it."""
    chunks: tuple[int, ...]
    """Chunk sizes in rows; each is timed, besides the full logits tensor."""


@dataclass(frozen=True)
class Cost:
    """Time, memory and error of one way to compute the loss."""

    way: str
    """:data:`WHOLE`, or the chunk size in words."""
    milliseconds: float
    """Forward and backward pass, the median over the rounds."""
    mebibytes: float
    """Peak memory beyond inputs and weights."""
    difference: float
    """Relative difference of the weight gradient from that in float64."""


def compare(work: Work, rounds: int, progress: Callable[[str], None]) -> list[Cost]:
    """Time every way in a process of its own, for the sake of its peak memory; :data:`WHOLE` comes first."""
    costs = []
    for chunk in (None, *work.chunks):
        progress(WHOLE if chunk is None else f"chunks of {chunk}")
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            costs.append(pool.submit(measure, work, chunk, rounds).result())
    return costs


def measure(work: Work, chunk: int | None, rounds: int) -> Cost:
    """Time one way in this process."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        made = torch.randn(shape, generator=generator) * shape[-1] ** -0.5
        return made.to(device, getattr(torch, work.dtype)).requires_grad_()

    leaves = (normal(work.rows, work.hidden), normal(work.columns, work.hidden), normal(work.columns))
    targets = torch.randint(work.columns, (work.rows,), generator=generator).to(device)

    def once() -> tuple[Tensor, ...]:
        if chunk is None:
            loss = F.cross_entropy(F.linear(*leaves).float(), targets, reduction="sum")
        else:
            loss, _ = linear_cross_entropy(*leaves, targets, None, chunk)
        gradients = torch.autograd.grad(loss, leaves)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return gradients

    # A small product first, so that one-time allocations of the process are not counted.
    torch.autograd.grad(F.linear(leaves[0][:8], leaves[1][:8]).sum(), leaves[0])
    before = _memory(device)
    once()
    peak = _peak(device) - before
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        once()
        times.append(1000 * (time.perf_counter() - began))
    way = WHOLE if chunk is None else f"chunks of {chunk}"
    return Cost(way, statistics.median(times), max(peak, 0) / 2**20, _difference(leaves, targets, once()[1]))


def _difference(leaves: tuple[Tensor, Tensor, Tensor], targets: Tensor, gradient: Tensor) -> float:
    """Relative difference of a weight gradient from that in float64, on the same values."""
    features, weight, bias = (x.detach().double() for x in leaves)
    d_logits = F.linear(features, weight, bias).softmax(1)
    d_logits[torch.arange(len(targets)), targets] -= 1
    true = d_logits.T @ features
    return float((gradient.double() - true).norm() / true.norm())


def _memory(device: torch.device) -> int:
    """Bytes in use; resets the peak on a GPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()


def _peak(device: torch.device) -> int:
    """Peak bytes in use: since :func:`_memory` on a GPU, since the start of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
