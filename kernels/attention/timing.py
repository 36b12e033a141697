"""Time on a GPU, and what the GPU can do at most."""

import statistics
from collections.abc import Callable

import torch

from gptface_dist.errors import UserError

Timer = Callable[[Callable[[], object]], float]
"""Median milliseconds of a call."""


def require_gpu() -> torch.device:
    """The GPU to measure; :class:`UserError` without one."""
    if not torch.cuda.is_available():
        raise UserError("bench attention needs a CUDA GPU: none was found, so nothing was measured")
    return torch.device("cuda", torch.cuda.current_device())


def cuda_timer(rounds: int) -> Timer:
    """Times on the GPU, after warming up, with the cache emptied before every call."""
    cache = torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")

    def timed(call: Callable[[], object]) -> float:
        for _ in range(3):
            call()
        events = []
        for _ in range(rounds):
            cache.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            events.append((start, end))
        # Once, so that the CPU launches the calls ahead: a call's time is the GPU's, not the CPU's.
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in events)

    return timed


def ceilings(timer: Timer, device: torch.device, side: int = 8192) -> tuple[float, float, float]:
    """GB/s of a copy (read and written), TFLOP/s of a bf16 and of an FP8 matrix product, of random data, by PyTorch."""
    source = torch.randn(side, side, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * source.nbytes / timer(lambda: target.copy_(source)) / 1e6
    half = source.bfloat16()
    bf16 = 2 * side**3 / timer(lambda: half @ half) / 1e9
    eight, one = source.to(torch.float8_e4m3fn), torch.ones((), device=device)
    fp8 = timer(lambda: torch._scaled_mm(eight, eight.T, one, one, out_dtype=torch.bfloat16, use_fast_accum=True))
    return bandwidth, bf16, 2 * side**3 / fp8 / 1e9
