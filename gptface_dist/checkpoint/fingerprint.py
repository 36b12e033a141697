"""Fingerprints of tensors that do not depend on how the tensor is sharded.

A hash of bytes depends on their order, and ranks hold their chunks in the order of their layout. Here each element adds
``mix(its index in the whole tensor) * (its 32 bits + a constant)`` modulo 2**64, with an odd ``mix``: chunks add up in any
order, on any number of ranks. The fingerprint detects one wrong element always, and several or misplaced elements but for a
chance of about 2**-32. It does not protect against intent; the files' SHA-256 do.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from gptface_dist.checkpoint.chunk_spec import ChunkSpec

_BLOCKS = {"cpu": 2**15, "cuda": 2**24}
"""Elements per block by device type: on a CPU, the block's 64-bit integers fit its cache."""
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_ADDED = 0x632BE59BD9B4E019


def fingerprint(chunks: Iterable[tuple[ChunkSpec, Tensor]], shape: tuple[int, ...]) -> int:
    """Sum in [0, 2**64) over chunks, with their float32 values, of a tensor of ``shape``; sums of disjoint chunks add up."""
    return sum(int(_sum(chunk, values, shape)) for chunk, values in chunks) % 2**64


def _sum(chunk: ChunkSpec, values: Tensor, shape: tuple[int, ...]) -> Tensor:
    rows = torch.zeros((), dtype=torch.int64, device=values.device)
    for axis, (start, length) in enumerate(zip(chunk.offsets[:-1], chunk.sizes[:-1], strict=True)):
        along = torch.arange(start, start + length, device=values.device)
        rows = (rows * shape[axis]).unsqueeze(-1) + along
    # One entry for each run along the last axis: index of its first element in the flattened whole.
    firsts = (rows.flatten() * shape[-1] + chunk.offsets[-1]).unsqueeze(1)
    bits = values.contiguous().view(torch.int32).view(len(firsts), -1)
    width, limit = bits.shape[1], _BLOCKS[values.device.type]
    each = max(1, limit // width)
    # 64-bit integers wrap: this is the sum modulo 2**64.
    total = torch.zeros((), dtype=torch.int64, device=values.device)
    for top in range(0, len(bits), each):
        for left in range(0, width, limit):
            block = bits[top : top + each, left : left + limit]
            mixed = firsts[top : top + each] + torch.arange(left, left + block.shape[1], device=bits.device)
            mixed *= _GOLDEN
            mixed ^= mixed >> 29
            # An odd factor: no bit of the element is lost.
            mixed |= 1
            mixed *= block.long() + _ADDED
            total += mixed.sum()
    return total
