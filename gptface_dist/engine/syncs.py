"""How often steps make the host wait for the GPU."""

import warnings
from collections.abc import Iterable

import torch
from torch import Tensor

from gptface_dist.engine.engine import Engine
from gptface_dist.sequence import PaddedBatch

WORDS = "called a synchronizing CUDA operation"
"""PyTorch's warning, once for each time."""


def synchronisations(engine: Engine, steps: Iterable[list[PaddedBatch[Tensor]]]) -> int:
    """Do an optimizer step on each of the micro-batches, and count how often PyTorch waited for the GPU meanwhile.

    Needs CUDA. PyTorch counts copies and reads of values; not its collectives, nor ``torch.cuda.synchronize``, which
    megatron-core calls between pipeline stages. Batches must be on the GPU already. The first step of an engine may wait more
    often than the later ones.
    """
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for batches in steps:
                engine.step(batches)
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return sum(WORDS in str(warning.message) for warning in found)
