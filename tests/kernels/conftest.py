"""Without a GPU, Triton's kernels are interpreted; with one, the same tests run the compiled kernels."""

import pytest
import torch

from tests.conftest import INTERPRET


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        monkeypatch.setenv(INTERPRET, "1")
