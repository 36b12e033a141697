"""What is counted of PyTorch's warnings; CUDA's own part cannot be tried without it."""

import warnings
from typing import Any, cast

import pytest
import torch

from gptface_dist.engine.syncs import synchronisations


class Waiting:
    """An engine whose steps wait so often."""

    def __init__(self, modes: list[Any]):
        self.modes = modes

    def step(self, times: list[Any]) -> None:
        """One warning a time, from one and the same line, and another warning."""
        assert self.modes[-1] == "warn"
        for _ in times:
            warnings.warn("called a synchronizing CUDA operation (Triggered internally)", UserWarning, stacklevel=1)
        warnings.warn("something else", UserWarning, stacklevel=1)


def test_every_synchronisation_is_counted_and_the_mode_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[Any] = []
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    warnings.simplefilter("ignore")
    engine = cast(Any, Waiting(modes))
    assert synchronisations(engine, [[0], [0, 0]]) == 3
    assert synchronisations(engine, []) == 0
    assert modes == ["warn", 0, "warn", 0]

    def fail(_: Any) -> None:
        raise RuntimeError

    engine.step = fail
    with pytest.raises(RuntimeError):
        synchronisations(engine, [[0]])
    assert modes[-1] == 0
