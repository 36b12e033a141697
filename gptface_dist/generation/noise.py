"""Noise of one sample: a function of the seed and the sample's numbers, whatever else is drawn."""

import torch
from torch import Tensor

from gptface_dist.hashing import stable_hash


class Noise:
    """Gumbel noise from a generator keyed by integers, drawn on the CPU: the same values for every device."""

    def __init__(self, *key: int):
        self._generator = torch.Generator().manual_seed(stable_hash(repr(key)))

    def gumbel(self, *shape: int) -> Tensor:
        """Float32 standard Gumbel noise: the argmax of log-probabilities plus noise is a draw from their distribution."""
        return -torch.empty(shape).exponential_(generator=self._generator).log()
