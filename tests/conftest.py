"""Without a GPU, kernels are tested in Triton's interpreter."""

import os
import shutil

import hypothesis

INTERPRET = "TRITON_INTERPRET"


def pytest_configure() -> None:
    """Triton asks when it is first imported, and any test module may be the one that does (megatron-core imports it)."""
    if shutil.which("nvidia-smi") is None:
        os.environ[INTERPRET] = "1"


# A slow machine is no failure.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


def pytest_collection_finish() -> None:
    """Only tests of kernels interpret them; what others spawn shall not inherit it."""
    os.environ.pop(INTERPRET, None)
