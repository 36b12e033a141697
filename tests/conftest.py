"""Without a GPU, kernels are tested in Triton's interpreter."""

import os
import shutil
from pathlib import Path

import hypothesis
import pytest

INTERPRET = "TRITON_INTERPRET"


def pytest_configure() -> None:
    """Triton asks when it is first imported, and any test module may be the one that does (megatron-core imports it)."""
    if shutil.which("nvidia-smi") is None:
        os.environ[INTERPRET] = "1"


# A slow machine is no failure.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


LONGEST = (
    # Parity and resumption start many processes; those beside them start none.
    "engine/test_parity.py",
    "kernels/test_gate.py",
    "kernels/test_launch.py",
    "checkpoint/test_resume.py",
    "kernels/test_attention.py",
    "faces/test_render.py",
    "data/test_loader.py",
    "engine/test_update.py",
    "training/test_attention_health.py",
    "training/test_train.py",
    "training/test_run.py",
    "distributed/test_watchdog.py",
    "training/test_fp8_study.py",
    "benchmarks/test_step.py",
    "launch/test_local.py",
    "engine/test_cuda.py",
    "training/test_init_from.py",
    "distributed/test_strangers.py",
)
"""The files that take longest: they come first, so that the workers of a parallel run end together."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order by file: the longest first, all others as they were."""
    first = {Path(__file__).parent / name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: first.get(item.path, len(first)))


def pytest_collection_finish() -> None:
    """Only tests of kernels interpret them; what others spawn shall not inherit it."""
    os.environ.pop(INTERPRET, None)
