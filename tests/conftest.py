"""Without a GPU, kernels are tested in Triton's interpreter."""

import os
import shutil

INTERPRET = "TRITON_INTERPRET"


def pytest_configure() -> None:
    """Triton asks when it is first imported, and any test module may be the one that does (megatron-core imports it)."""
    if shutil.which("nvidia-smi") is None:
        os.environ[INTERPRET] = "1"


def pytest_collection_finish() -> None:
    """Only tests of kernels interpret them; what others spawn shall not inherit it."""
    os.environ.pop(INTERPRET, None)
