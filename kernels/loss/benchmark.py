"""Time and memory of the chunked output loss beside logits that are there as a whole."""

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
    """A batch's output layer."""

    rows: int
    """Masked tokens."""
    columns: int
    """Ids."""
    hidden: int
    """Width of the features."""
    dtype: str
    """Of features and weights, as torch names it."""
    chunks: tuple[int, ...]
    """Rows at a time, each a way to be timed beside whole logits."""


@dataclass(frozen=True)
class Cost:
    """One way, timed."""

    way: str
    """What was timed."""
    milliseconds: float
    """Forward and backward: median over the rounds."""
    mebibytes: float
    """Largest memory in use beyond inputs and weights."""
    difference: float
    """Of its weight gradient from that of float64, relative."""


def compare(work: Work, rounds: int, progress: Callable[[str], None]) -> list[Cost]:
    """Time every way, each in a process of its own, so that its memory is its own; :data:`WHOLE` first."""
    found = []
    for chunk in (None, *work.chunks):
        progress(WHOLE if chunk is None else f"chunks of {chunk}")
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            found.append(pool.submit(measure, work, chunk, rounds).result())
    return found


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
        found = torch.autograd.grad(loss, leaves)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return found

    # A small product first: what a process sets up once is not this work's memory.
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


def _difference(leaves: tuple[Tensor, Tensor, Tensor], targets: Tensor, found: Tensor) -> float:
    """How far a weight gradient is from float64's, on the same values."""
    features, weight, bias = (x.detach().double() for x in leaves)
    d_logits = F.linear(features, weight, bias).softmax(1)
    d_logits[torch.arange(len(targets)), targets] -= 1
    true = d_logits.T @ features
    return float((found.double() - true).norm() / true.norm())


def _memory(device: torch.device) -> int:
    """Bytes in use."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()


def _peak(device: torch.device) -> int:
    """The most bytes that were in use: since :func:`_memory` on a GPU, since the process began on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
