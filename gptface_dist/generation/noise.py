"""Noise that belongs to one sample: a function of the seed and the sample's numbers, whatever is drawn beside it."""

import torch
from torch import Tensor

from gptface_dist.hashing import stable_hash


class Noise:
    """Gumbel noise from a generator keyed by integers. Drawn on the CPU, so that all devices hear the same."""

    def __init__(self, *key: int):
        self._generator = torch.Generator().manual_seed(stable_hash(repr(key)))

    def gumbel(self, *shape: int) -> Tensor:
        """Float32 standard Gumbel noise: the argmax of log-probabilities and it is a draw from the distribution."""
        return -torch.empty(shape).exponential_(generator=self._generator).log()
