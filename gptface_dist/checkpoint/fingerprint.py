"""Fingerprints of tensors that do not depend on how the tensor is cut into pieces.

A hash of bytes depends on their order, and ranks hold their pieces in the order of their layout. Here each element adds
``mix(its place in the whole tensor) * (its 32 bits + a constant)`` modulo 2**64, with an odd ``mix``: pieces are summed in any
order, on any number of ranks. One wrong element always shows; several, or elements in wrong places, but for a chance of about
2**-32. It is no protection against intent, which the files' SHA-256 are for.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from gptface_dist.checkpoint.chunk_spec import ChunkSpec

_BLOCKS = {"cpu": 2**15, "cuda": 2**24}
"""Elements at a time: on a processor, so many that their 64-bit integers stay in its cache."""
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_ADDED = 0x632BE59BD9B4E019


def fingerprint(parts: Iterable[tuple[ChunkSpec, Tensor]], shape: tuple[int, ...]) -> int:
    """Sum over the parts, in [0, 2**64), of a float32 tensor of ``shape``; each part is a box and its values."""
    return sum(int(_sum(box, values, shape)) for box, values in parts) % 2**64


def _sum(box: ChunkSpec, values: Tensor, shape: tuple[int, ...]) -> Tensor:
    places = torch.zeros((), dtype=torch.int64, device=values.device)
    for axis, (start, length) in enumerate(zip(box.offsets[:-1], box.sizes[:-1], strict=True)):
        along = torch.arange(start, start + length, device=values.device)
        places = (places * shape[axis]).unsqueeze(-1) + along
    # One row for each run along the last axis: its first place in the flattened whole.
    firsts = (places.flatten() * shape[-1] + box.offsets[-1]).unsqueeze(1)
    bits = values.contiguous().view(torch.int32).view(len(firsts), -1)
    width, limit = bits.shape[1], _BLOCKS[values.device.type]
    each = max(1, limit // width)
    # 64-bit integers wrap: this is the sum modulo 2**64.
    total = torch.zeros((), dtype=torch.int64, device=values.device)
    for top in range(0, len(bits), each):
        for left in range(0, width, limit):
            block = bits[top : top + each, left : left + limit]
            place = firsts[top : top + each] + torch.arange(left, left + block.shape[1], device=bits.device)
            place *= _GOLDEN
            place ^= place >> 29
            # An odd factor: no bit of the element is lost.
            place |= 1
            place *= block.long() + _ADDED
            total += place.sum()
    return total
