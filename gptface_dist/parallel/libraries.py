"""What DeepSpeed and megatron-core need to be imported quietly and quickly, and to run where there is no CUDA."""

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
    """Let megatron-core (0.16) build layers on a host without CUDA: it asks for the current device unconditionally."""
    if not torch.cuda.is_available():
        torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]


class _TorchOfSchedules:
    """torch, but for the literal ``device="cuda"`` of the one tensor that megatron-core's schedules make (0.16)."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def zeros(*size: Any, **options: Any) -> Tensor:
        """Zeros on the CPU."""
        return torch.zeros(*size, **options | {"device": "cpu"})


@contextlib.contextmanager
def schedules() -> Iterator[None]:
    """Around megatron-core's schedules: on a host without CUDA, their tensors are made on the CPU.

    Only what that module itself calls is replaced: a mode for all of torch's functions would slow down every one of them.
    """
    from megatron.core.pipeline_parallel import schedules

    kept = schedules.torch
    if not torch.cuda.is_available():
        schedules.torch = _TorchOfSchedules()
    try:
        yield
    finally:
        schedules.torch = kept


def import_libraries() -> None:
    """Import DeepSpeed and megatron-core without what training never uses of theirs, more than half of the time that takes.

    DeepSpeed (0.19.8) imports mlflow for its autotuner. megatron-core (0.16.1), and DeepSpeed's Muon, which its ZeRO imports in
    the first step whatever the optimizer, give functions to ``torch.compile``, which loads the compiler; we call none of them,
    and without CUDA nobody else does.
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
    """Around what makes DeepSpeed and megatron-core greet every process (0.19.8, 0.16.1): on standard output, by their loggers,
    and by warnings of packages that are optional. Warnings of theirs stay out afterwards as well, errors never.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    warnings.filterwarnings("ignore", module=r"(megatron|deepspeed)\.")
    # DeepSpeed 0.19.8 calls torch 2.13's collectives by their earlier names; told once a call.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        yield
