"""Device, backend and memory of this process; description of its machine."""

import ctypes
import logging
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptface_dist.errors import UserError

log = logging.getLogger(__name__)


def device() -> torch.device:
    """The current CUDA device, or the CPU without CUDA."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def set_device(local_rank: int) -> torch.device:
    """Select this process's GPU: number ``local_rank``, or the only visible one, as under ``srun --gpus-per-task=1``.

    Returns the CPU without CUDA. Call it before anything else that uses CUDA. :class:`UserError` where several GPUs are
    visible, but not number ``local_rank``.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    gpus = torch.cuda.device_count()
    if gpus > 1 and local_rank >= gpus:
        raise UserError(
            f"local rank {local_rank} has no GPU: {gpus} are visible; start at most {gpus} processes on this machine"
        )
    chosen = torch.device("cuda", local_rank if gpus > 1 else 0)
    torch.cuda.set_device(chosen)
    return chosen


def refuse_shared_gpu(store: Any, rank: int) -> None:
    """:class:`UserError` where another rank of ``store`` (a ``torch.distributed`` store) has this process's GPU.

    Of the ranks that share a GPU, all but the first to call it raise. NCCL would fail in the first collective, with a
    message of many lines.
    """
    if not torch.cuda.is_available():
        return
    gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
    owner = store.compare_set(f"gpu/{gpu.uuid}", "", str(rank)).decode()
    if owner != str(rank):
        raise UserError(
            f"ranks {owner} and {rank} have the same GPU ({gpu.name}, {gpu.uuid}): start one process for each GPU, "
            "or let each see a GPU of its own"
        )


def check_gpus(processes: int) -> None:
    """:class:`UserError` where this machine has GPUs, but fewer than ``processes``."""
    if torch.cuda.is_available() and torch.cuda.device_count() < processes:
        raise UserError(f"{processes} processes need as many GPUs, there are {torch.cuda.device_count()}")


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Copy a CPU tensor to the device; to CUDA from pinned memory and without waiting for the copy."""
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def backend() -> str:
    """The ``torch.distributed`` backend for the device: ``nccl`` with CUDA, else ``gloo``."""
    return "nccl" if torch.cuda.is_available() else "gloo"


def native_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware.

    A CPU without AVX-512 emulates it: a convolution and its gradient take 22 times as long as in float32 (torch 2.13, one
    thread of an AMD EPYC, 2026-11-27).
    """
    return device.type == "cuda" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def warn_of_emulation(dtype: str | None, option: str) -> None:
    """Log that ``option`` asks for bfloat16 where the device emulates it; ``dtype`` is its value, ``bfloat16`` or ``bf16``."""
    if dtype in ("bfloat16", "bf16") and not native_bfloat16(device()):
        instructions = torch.backends.cpu.get_cpu_capability()
        log.warning("%s %s: this CPU (%s) emulates it, and is many times slower than in float32", option, dtype, instructions)


def trim_host_memory() -> None:
    """Return memory that glibc has freed to the system; does nothing with other C libraries.

    glibc keeps freed blocks of all sizes: a process that works on tensors of changing sizes grows to several times its use
    (docs/notes.md).
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def versions(*packages: str) -> str:
    """``name version`` of each installed package, joined by commas."""
    return ", ".join(f"{name} {metadata.version(name)}" for name in packages)


def hardware(*packages: str) -> str:
    """CPU and the instruction set that torch uses of it, cores, GPU, Python, and :func:`versions` of the packages."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor() or platform.machine()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    instructions = torch.backends.cpu.get_cpu_capability()
    return f"{cpu} ({instructions}), {os.cpu_count()} cores, {gpu}; Python {platform.python_version()}, {versions(*packages)}"
