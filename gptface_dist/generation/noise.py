"""Noise of one sample: a function of the seed and the sample's numbers, whatever else is drawn."""

import hashlib

import torch
from torch import Tensor


class Noise:
    """Gumbel noise from a generator keyed by integers, drawn on the CPU: the same values for every device."""

    def __init__(self, *key: int):
        digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
        self._generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))

    def gumbel(self, *shape: int) -> Tensor:
        """Float32 standard Gumbel noise: the argmax of log-probabilities plus noise is a draw from their distribution."""
        return -torch.empty(shape).exponential_(generator=self._generator).log()
