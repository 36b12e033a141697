"""The forward kernel: softmax(Q K^T) V over FP8 copies, one tile of queries of one head a program.

Every tile comes through a tensor descriptor (TMA), which is also what warp specialisation needs.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from gptface_dist.kernels.attention.emulator import P_EXPONENT
from gptface_dist.kernels.attention.options import TILE
from gptface_dist.kernels.attention.quantise import Quantised, Tiles, strides

_P_EXPONENT = tl.constexpr(float(P_EXPONENT))
_FAR = tl.constexpr(1e30)


@triton.jit
def resident(copy, row, ROWS: tl.constexpr, D: tl.constexpr, SPECIALIZE: tl.constexpr):
    """ROWS rows of a tiled copy [.., D] from ``row`` on, which a program keeps.

    Specialised warps share these rows out among them, which Triton 3.7.1 compiles for descriptors made in the kernel
    only, not for the host's (triton-lang/triton#11587) and not for pointers.
    """
    if SPECIALIZE:
        found = tl.make_tensor_descriptor(copy, [row + ROWS, D], [D, 1], [ROWS, D]).load([row, 0])
    else:
        found = tl.load(copy + (row + tl.arange(0, ROWS)).to(tl.int64)[:, None] * D + tl.arange(0, D)[None, :])
    return found


@triton.jit
def resident_vector(copy, row, ROWS: tl.constexpr, SPECIALIZE: tl.constexpr):
    """Likewise of a vector."""
    if SPECIALIZE:
        found = tl.make_tensor_descriptor(copy, [row + ROWS], [1], [ROWS]).load([row])
    else:
        found = tl.load(copy + row + tl.arange(0, ROWS))
    return found


@triton.jit
def _forward(
    q_rows, k_rows, v_columns, out, lse, p_max, starts, lengths, tiled_starts, qk_scale, v_scale, v_mean, factor,
    stride_b, stride_t, stride_h, capacity,
    D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, SPECIALIZE: tl.constexpr,
):  # fmt: skip
    """``factor`` multiplies the scores, log2 e included. ``lse`` and ``p_max`` [H capacity]: see the emulator's State."""
    tile, head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + sequence)
    # A program past the end has nothing to loop over and stores nothing. (It must not return here: warp specialisation
    # does not compile beside a return.)
    end = tl.where(tile * QUERIES < length, length, 0)
    first = tl.load(tiled_starts + sequence)
    row, column = head * capacity + first, head * D
    index = sequence * tl.num_programs(1) + head
    factor = factor * tl.load(qk_scale + index * 2) * tl.load(qk_scale + index * 2 + 1)
    q = resident(q_rows, row + tile * QUERIES, QUERIES, D, SPECIALIZE)
    keys = tl.arange(0, KEYS)[None, :]
    largest = tl.full([QUERIES], -_FAR, tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    mixed = tl.zeros([QUERIES, D], tl.float32)
    for n in tl.range(0, end, KEYS, warp_specialize=SPECIALIZE):
        scores = tl.dot(q, tl.trans(k_rows.load([row + n, 0]))) * factor
        scores = tl.where(n + keys < length, scores, -_FAR)
        new = tl.maximum(largest, tl.ceil(tl.max(scores, 1)))
        p8 = tl.math.exp2(scores - (new - _P_EXPONENT)[:, None]).to(q.dtype)
        shrink = tl.math.exp2(largest - new)
        total = total * shrink + tl.sum(p8.to(tl.float32), 1)
        mixed = tl.dot(p8, tl.trans(v_columns.load([column, first + n])), mixed * shrink[:, None])
        largest = new

    rows, columns = tile * QUERIES + tl.arange(0, QUERIES), tl.arange(0, D)
    seen = rows < length
    scale, mean = tl.load(v_scale + index * D + columns), tl.load(v_mean + index * D + columns)
    found = mixed / total[:, None] * scale[None, :] + mean[None, :]
    place = sequence.to(tl.int64) * stride_b + (tl.load(starts + sequence) + rows)[:, None].to(tl.int64) * stride_t
    place += head * stride_h + columns[None, :]
    tl.store(out + place, found.to(out.dtype.element_ty), mask=seen[:, None])
    whole = rows < tl.cdiv(length, QUERIES) * QUERIES
    tl.store(lse + row + rows, tl.where(seen, largest + tl.math.log2(total) - _P_EXPONENT, _FAR), mask=whole)
    tl.store(p_max + row + rows, tl.where(seen, tl.math.exp2(_P_EXPONENT) / total, 0.0), mask=whole)


@dataclass(frozen=True)
class Launch:
    """How a kernel is compiled for Hopper."""

    queries: int
    """Queries of a tile."""
    keys: int
    """Keys of a tile."""
    specialize: bool
    """Whether loads and matrix products run in different warps."""
    num_stages: int = 2
    """Tiles in flight."""

    @property
    def num_warps(self) -> int:
        """Triton specialises warps for 4 only; with fewer than 8 and no specialisation the tiles do not fit the registers."""
        return 4 if self.specialize else 8

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of a launch."""
        return {
            "QUERIES": self.queries,
            "KEYS": self.keys,
            "SPECIALIZE": self.specialize,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


def forward_launch(specialize: bool) -> Launch:
    """Of the forward kernel, for both head sizes."""
    return Launch(queries=TILE, keys=TILE, specialize=specialize)


def rows(x: Tensor, count: int) -> TensorDescriptor:
    """Blocks of ``count`` rows of a tiled copy [H capacity, D]; blocks of ``count`` of a vector [H capacity]."""
    return TensorDescriptor.from_tensor(x, [count, *x.shape[1:]])


def columns(x: Tensor, size: int, count: int) -> TensorDescriptor:
    """Blocks of ``count`` tokens of one head's ``size`` channels of a transposed copy [H D, capacity]."""
    return TensorDescriptor.from_tensor(x, [size, count])


def forward(
    x: Quantised, tiles: Tiles, like: Tensor, factor: float, specialize: bool
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Attention of quantised q, k, v, and what the backward pass needs of it.

    Args:
        x: the copies.
        tiles: where the sequences lie.
        like: q, whose shape and dtype the output has.
        factor: what the scores are multiplied with, log2 e included.
        specialize: see :class:`Launch`.

    Returns the output, zero beyond the lengths, and float32 [H capacity] ``lse`` and ``p_max``.
    """
    heads, size = like.shape[-2:]
    launch = forward_launch(specialize)
    out = torch.zeros(like.shape, dtype=like.dtype, device=like.device)
    lse, p_max = (torch.empty(heads * tiles.capacity, device=like.device) for _ in range(2))
    _forward[(tiles.tiles, heads, len(tiles.lengths))](
        x.q_rows, rows(x.k_rows, launch.keys), columns(x.v_columns, size, launch.keys),
        out, lse, p_max, tiles.starts, tiles.lengths, tiles.tiled_starts, x.qk_scale, x.v_scale, x.v_mean, factor,
        *strides(out), tiles.capacity, D=size, **launch.arguments(),
    )  # fmt: skip
    return out, lse, p_max
