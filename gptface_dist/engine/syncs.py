"""Count of host-device synchronisations in optimizer steps."""

import warnings
from collections.abc import Iterable

import torch
from torch import Tensor

from gptface_dist.engine.engine import Engine
from gptface_dist.sequence import PaddedBatch

WORDS = "called a synchronizing CUDA operation"
"""Start of PyTorch's warning, issued at each synchronisation."""


def synchronisations(engine: Engine, steps: Iterable[list[PaddedBatch[Tensor]]]) -> int:
    """Do an optimizer step on each list of micro-batches, and count the synchronisations that PyTorch reports meanwhile.

    Needs CUDA, with batches on the GPU. PyTorch reports copies and reads of values, but neither collectives nor
    ``torch.cuda.synchronize``, which megatron-core calls between pipeline stages. The first step of an engine may synchronise
    more often than later ones.
    """
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for batches in steps:
                engine.step(batches)
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return sum(WORDS in str(warning.message) for warning in caught)
