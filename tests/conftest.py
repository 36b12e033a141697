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
    # One of these starts many processes; those beside it start none.
    "engine/test_parity.py",
    "kernels/test_gate.py",
    "kernels/test_launch.py",
    "faces/test_render.py",
    "data/test_loader.py",
    "checkpoint/test_resume.py",
    "data/test_fuzz.py",
    "benchmarks/test_step.py",
    "engine/test_update.py",
    "training/test_run.py",
)
"""Files that take more than a minute: they come first, so that the workers of a parallel run end together."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order by file: the longest first, all others as they were."""
    first = {Path(__file__).parent / name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: first.get(item.path, len(first)))


def pytest_collection_finish() -> None:
    """Only tests of kernels interpret them; what others spawn shall not inherit it."""
    os.environ.pop(INTERPRET, None)
