"""The forward kernel: softmax(Q K^T) V over FP8 copies, a tile of queries of one head at a time.

Every tile comes through a tensor descriptor (TMA), which is also what warp specialisation needs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from gptface_dist.kernels.attention.emulator import P_EXPONENT
from gptface_dist.kernels.attention.launch import Launch
from gptface_dist.kernels.attention.options import TILE
from gptface_dist.kernels.attention.quantise import Quantised, Tiles, strides

_P_EXPONENT = tl.constexpr(float(P_EXPONENT))
_FAR = tl.constexpr(1e30)

INTERPRETED_PROGRAMS = 3
"""Programs of a persistent launch where there is no GPU: few, so that each takes several tiles."""


@triton.jit
def resident(copy, row, ROWS: tl.constexpr, D: tl.constexpr, SPECIALIZE: tl.constexpr):
    """ROWS rows of a tiled copy [.., D] from ``row`` on, which a program keeps.

    Specialised warps share these rows out among them, which Triton 3.7.1 compiles for descriptors made in the kernel
    only, not for the host's (triton-lang/triton#11587) and not for pointers.
    """
    if SPECIALIZE:
        block = tl.make_tensor_descriptor(copy, [row + ROWS, D], [D, 1], [ROWS, D]).load([row, 0])
    else:
        block = tl.load(copy + (row + tl.arange(0, ROWS)).to(tl.int64)[:, None] * D + tl.arange(0, D)[None, :])
    return block


@triton.jit
def resident_vector(copy, row, ROWS: tl.constexpr, SPECIALIZE: tl.constexpr):
    """ROWS entries of a tiled vector from ``row`` on, as :func:`resident`."""
    if SPECIALIZE:
        block = tl.make_tensor_descriptor(copy, [row + ROWS], [1], [ROWS]).load([row])
    else:
        block = tl.load(copy + row + tl.arange(0, ROWS))
    return block


# Of these, one more or less must not be another kernel: Triton compiles 1 and multiples of 16 apart from other numbers.
@triton.jit(do_not_specialize=["tiles", "heads", "items"])
def _forward(
    q_rows, k_rows, v_columns, out, lse, p_max, starts, lengths, tiled_starts, qk_scale, v_scale, v_mean, factor,
    stride_b, stride_t, stride_h, capacity, tiles, heads, items,
    D: tl.constexpr, TILE: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, OVERLAP: tl.constexpr,
    SPECIALIZE: tl.constexpr, PERSISTENT: tl.constexpr,
):  # fmt: skip
    """``factor`` multiplies the scores, log2 e included. ``lse`` and ``p_max`` [H capacity]: see the emulator's State.

    There are ``items`` tiles of queries: ``tiles`` for each of ``heads`` heads of each sequence.
    """
    if PERSISTENT:
        for item in tl.range(tl.program_id(0), items, tl.num_programs(0)):
            _attend(
                item % tiles, item // tiles % heads, item // tiles // heads, heads,
                q_rows, k_rows, v_columns, out, lse, p_max, starts, lengths, tiled_starts, qk_scale, v_scale, v_mean, factor,
                stride_b, stride_t, stride_h, capacity, D, TILE, QUERIES, KEYS, OVERLAP, SPECIALIZE,
            )  # fmt: skip
    else:
        _attend(
            tl.program_id(0), tl.program_id(1), tl.program_id(2), heads,
            q_rows, k_rows, v_columns, out, lse, p_max, starts, lengths, tiled_starts, qk_scale, v_scale, v_mean, factor,
            stride_b, stride_t, stride_h, capacity, D, TILE, QUERIES, KEYS, OVERLAP, SPECIALIZE,
        )  # fmt: skip


@triton.jit
def _attend(
    tile, head, sequence, heads,
    q_rows, k_rows, v_columns, out, lse, p_max, starts, lengths, tiled_starts, qk_scale, v_scale, v_mean, factor,
    stride_b, stride_t, stride_h, capacity,
    D: tl.constexpr, TILE: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, OVERLAP: tl.constexpr,
    SPECIALIZE: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head."""
    length = tl.load(lengths + sequence)
    # Past the length there is nothing to loop over and no output. (It must not return here: warp specialisation does not
    # compile beside a return.)
    end = tl.where(tile * QUERIES < length, length, 0)
    first = tl.load(tiled_starts + sequence)
    row, column = head * capacity + first, head * D
    index = sequence * heads + head
    factor = factor * tl.load(qk_scale + index * 2) * tl.load(qk_scale + index * 2 + 1)
    q = resident(q_rows, row + tile * QUERIES, QUERIES, D, SPECIALIZE)
    keys = tl.arange(0, KEYS)[None, :]
    largest = tl.full([QUERIES], -_FAR, tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    mixed = tl.zeros([QUERIES, D], tl.float32)
    if OVERLAP:
        products = tl.dot(q, tl.trans(k_rows.load([row, 0])))
    for n in tl.range(0, end, KEYS, warp_specialize=SPECIALIZE):
        if OVERLAP:
            # Asynchronous: the tensor cores compute it during the exponentials. After the last tile it reads rows of other
            # tokens or uninitialised memory, and is not used.
            upcoming = tl.dot(q, tl.trans(k_rows.load([row + n + KEYS, 0])))
        else:
            products = tl.dot(q, tl.trans(k_rows.load([row + n, 0])))
        scores = tl.where(n + keys < length, products * factor, -_FAR)
        new = tl.maximum(largest, tl.ceil(tl.max(scores, 1)))
        p8 = tl.math.exp2(scores - (new - _P_EXPONENT)[:, None]).to(q.dtype)
        shrink = tl.math.exp2(largest - new)
        total = total * shrink + tl.sum(p8.to(tl.float32), 1)
        mixed = tl.dot(p8, tl.trans(v_columns.load([column, first + n])), mixed * shrink[:, None])
        largest = new
        if OVERLAP:
            products = upcoming

    rows, columns = tile * QUERIES + tl.arange(0, QUERIES), tl.arange(0, D)
    seen = rows < length
    scale, mean = tl.load(v_scale + index * D + columns), tl.load(v_mean + index * D + columns)
    output = mixed / total[:, None] * scale[None, :] + mean[None, :]
    place = sequence.to(tl.int64) * stride_b + (tl.load(starts + sequence) + rows)[:, None].to(tl.int64) * stride_t
    place += head * stride_h + columns[None, :]
    tl.store(out + place, output.to(out.dtype.element_ty), mask=seen[:, None])
    # The backward kernels read to the end of the last TILE, whatever the tiles here.
    whole = rows < tl.cdiv(length, TILE) * TILE
    tl.store(lse + row + rows, tl.where(seen, largest + tl.math.log2(total) - _P_EXPONENT, _FAR), mask=whole)
    tl.store(p_max + row + rows, tl.where(seen, tl.math.exp2(_P_EXPONENT) / total, 0.0), mask=whole)


def rows(x: Tensor, count: int) -> TensorDescriptor:
    """Blocks of ``count`` rows of a tiled copy [H capacity, D]; blocks of ``count`` of a vector [H capacity]."""
    return TensorDescriptor.from_tensor(x, [count, *x.shape[1:]])


def columns(x: Tensor, size: int, count: int) -> TensorDescriptor:
    """Blocks of ``count`` tokens of one head's ``size`` channels of a transposed copy [H D, capacity]."""
    return TensorDescriptor.from_tensor(x, [size, count])


def forward(
    x: Quantised, tiles: Tiles, like: Tensor, factor: float, launch: Launch
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Attention of quantised q, k, v, and what the backward pass needs of it.

    Args:
        x: the FP8 copies.
        tiles: positions of the sequences in the copies.
        like: q, whose shape and dtype the output has.
        factor: multiplies the scores, log2 e included.
        launch: tile sizes and launch parameters.

    Returns the output, zero beyond the lengths, and float32 [H capacity] ``lse`` and ``p_max``.
    """
    heads, size = like.shape[-2:]
    out = torch.zeros(like.shape, dtype=like.dtype, device=like.device)
    lse, p_max = (torch.empty(heads * tiles.capacity, device=like.device) for _ in range(2))
    count, sequences = tiles.tiles * TILE // launch.queries, len(tiles.lengths)
    items = count * heads * sequences
    grid = (min(items, programs(like.device, launch)), 1, 1) if launch.persistent else (count, heads, sequences)
    _forward[grid](
        x.q_rows, rows(x.k_rows, launch.keys), columns(x.v_columns, size, launch.keys),
        out, lse, p_max, tiles.starts, tiles.lengths, tiles.tiled_starts, x.qk_scale, x.v_scale, x.v_mean, factor,
        *strides(out), tiles.capacity, count, heads, items,
        D=size, TILE=TILE, PERSISTENT=launch.persistent, **launch.arguments(),
    )  # fmt: skip
    return out, lse, p_max


def programs(device: torch.device, launch: Launch) -> int:
    """Number of programs of a persistent launch: those resident at once, with 8 warps a multiprocessor."""
    if device.type != "cuda":
        return INTERPRETED_PROGRAMS
    return torch.cuda.get_device_properties(device).multi_processor_count * 8 // launch.num_warps
