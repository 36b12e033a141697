"""Quiet and quick imports of DeepSpeed and megatron-core, and patches to run them without CUDA."""

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def patch_megatron_for_cpu() -> None:
    """Let megatron-core (0.16) build layers on a host without CUDA, where it still calls ``torch.cuda.current_device``."""
    if not torch.cuda.is_available():
        torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]


class _TorchOfSchedules:
    """Proxy of torch without the literal ``device="cuda"`` of the one tensor that megatron-core's schedules make (0.16)."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def zeros(*size: Any, **options: Any) -> Tensor:
        """``torch.zeros`` on the CPU, whatever ``device`` says."""
        return torch.zeros(*size, **options | {"device": "cpu"})


@contextlib.contextmanager
def schedules() -> Iterator[None]:
    """Context for megatron-core's schedules: on a host without CUDA, they allocate tensors on the CPU.

    It replaces ``torch`` in that module only: a mode for all of torch's functions would slow down every one of them.
    """
    from megatron.core.pipeline_parallel import schedules

    original = schedules.torch
    if not torch.cuda.is_available():
        schedules.torch = _TorchOfSchedules()
    try:
        yield
    finally:
        schedules.torch = original


def import_libraries() -> None:
    """Import DeepSpeed and megatron-core without modules that training never uses, in less than half the time.

    DeepSpeed (0.19.8) imports mlflow for its autotuner. megatron-core (0.16.1), and DeepSpeed's Muon, which its ZeRO imports in
    the first step whatever the optimizer, pass functions to ``torch.compile``, which loads the compiler; training without CUDA
    calls none of them.
    """
    if "deepspeed" in sys.modules or "megatron.core" in sys.modules:
        return
    compiler, mlflow = torch.compile, {"mlflow": None} if "mlflow" not in sys.modules else {}
    if not torch.cuda.is_available():
        torch.compile = lambda function: function  # type: ignore[assignment]
    try:
        sys.modules.update(mlflow)  # type: ignore[arg-type]
        import deepspeed.runtime.zero.muon.muon_optimizer
        import megatron.core

        del deepspeed, megatron
    finally:
        torch.compile = compiler
        for name in mlflow:
            del sys.modules[name]


@contextlib.contextmanager
def quiet_imports() -> Iterator[None]:
    """Context that silences messages of DeepSpeed and megatron-core on import (0.19.8, 0.16.1): standard output, log lines and
    warnings about optional packages. Their warnings stay silenced afterwards; errors never are.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    warnings.filterwarnings("ignore", module=r"(megatron|deepspeed)\.")
    # DeepSpeed 0.19.8 calls torch 2.13's collectives by deprecated names and warns on every call.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        yield
