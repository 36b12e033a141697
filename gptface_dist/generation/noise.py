"""Noise that belongs to one sample: a function of the seed and the sample's numbers, whatever is drawn beside it."""

import hashlib

import torch
from torch import Tensor


class Noise:
    """Gumbel noise from a generator keyed by integers. Drawn on the CPU, so that all devices hear the same."""

    def __init__(self, *key: int):
        digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
        self._generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))

    def gumbel(self, *shape: int) -> Tensor:
        """Float32 standard Gumbel noise: the argmax of log-probabilities and it is a draw from the distribution."""
        return -torch.empty(shape).exponential_(generator=self._generator).log()
