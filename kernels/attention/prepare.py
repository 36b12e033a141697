"""What the backward pass makes of the output's gradient before any matrix product: its copies, delta, and bounds."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptface_dist.kernels.attention.emulator import TINY
from gptface_dist.kernels.attention.options import E4M3_MAX, TILE
from gptface_dist.kernels.attention.quantise import ROWS, Quantised, Tiles, _saturated, copying_launch, strides

_FP8_MAX = tl.constexpr(E4M3_MAX)
_TINY = tl.constexpr(TINY)


@triton.jit
def _prepare(
    out, dout, p_max, starts, lengths, tiled_starts, v_scale, v_mean, v_norm,
    dout_rows, dout_columns, dout_scale, delta, bounds, stride_b, stride_t, stride_h, capacity,
    BACKWARD: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One block's copies of dO, delta = rowsum(dO O), and the largest that dS and the rescaled P can be.

    ``bounds`` [B, H, blocks, 2]. The emulator's backward has the formulas.
    """
    block, head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + sequence)
    if block * ROWS >= tl.cdiv(length, TILE) * TILE:
        return
    rows, columns = block * ROWS + tl.arange(0, ROWS), tl.arange(0, D)
    seen = (rows < length)[:, None]
    place = sequence.to(tl.int64) * stride_b + (tl.load(starts + sequence) + rows)[:, None].to(tl.int64) * stride_t
    place += head * stride_h + columns[None, :]
    tiled = tl.load(tiled_starts + sequence) + rows
    by_row = (head.to(tl.int64) * capacity + tiled[:, None]) * D + columns[None, :]
    by_column = (head.to(tl.int64) * D + columns[None, :]) * capacity + tiled[:, None]
    vector = head * capacity + tiled
    index = sequence * tl.num_programs(1) + head

    o = tl.load(out + place, mask=seen, other=0.0).to(tl.float32)
    do = tl.load(dout + place, mask=seen, other=0.0).to(tl.float32)
    if BACKWARD == "bf16":
        half = do.to(dout_rows.dtype.element_ty)
        tl.store(dout_rows + by_row, half)
        tl.store(delta + vector, tl.sum(half.to(tl.float32) * o, 1))
    else:
        folded = tl.load(v_scale + index * D + columns)[None, :]
        centred = tl.where(seen, o - tl.load(v_mean + index * D + columns)[None, :], 0.0)
        scale = tl.maximum(tl.max(tl.abs(do * folded), 1), _TINY) / _FP8_MAX
        do8 = _saturated(do * folded * (1.0 / scale)[:, None], dout_columns.dtype.element_ty)
        tl.store(dout_columns + by_column, do8)
        tl.store(dout_scale + vector, scale)
        if BACKWARD == "fp8":
            tl.store(dout_rows + by_row, do8)
            unscaled = do8.to(tl.float32) / folded
            known = unscaled * scale[:, None]
            # As a multiple of the row's scale, like the product that it is taken from.
            tl.store(delta + vector, tl.sum(unscaled * centred, 1))
        else:
            half = do.to(dout_rows.dtype.element_ty)
            tl.store(dout_rows + by_row, half)
            known = half.to(tl.float32)
            tl.store(delta + vector, tl.sum(known * o, 1))
        most = tl.load(p_max + vector)
        norm = tl.sqrt(tl.sum(known * known, 1))
        bound = norm * (tl.load(v_norm + index) + tl.sqrt(tl.sum(centred * centred, 1))) * most
        tl.store(bounds + (index * tl.num_programs(0) + block) * 2, tl.max(bound, 0))
        tl.store(bounds + (index * tl.num_programs(0) + block) * 2 + 1, tl.max(most * scale, 0))


@dataclass(frozen=True)
class Result:
    """What the forward pass found."""

    out: Tensor
    """The output, contiguous."""
    lse: Tensor
    """Float32 [H capacity]: log2 of the sums of 2^scores; 1e30 in the padding of tiles."""
    p_max: Tensor
    """Float32 [H capacity]: upper bound of each row's largest P."""


@dataclass(frozen=True)
class Prepared:
    """What the kernels of the gradients read of dO."""

    rows: Tensor
    """[H capacity, D]: what dP is made of, in FP8 with V's scales folded in, or in bf16."""
    columns: Tensor
    """FP8 [H D, capacity]: what dV is made of; not filled where the backward pass is in bf16."""
    scale: Tensor
    """Float32 [H capacity]: of each row in FP8; not filled where the backward pass is in bf16."""
    delta: Tensor
    """Float32 [H capacity]: row sums of dO O, as multiples of the scale where dP is in FP8."""
    bounds: Tensor
    """Float32 [B, H, 2]: the largest that dS, and P times the rows' scales, can be."""


def prepare(dout: Tensor, x: Quantised, result: Result, tiles: Tiles, kind: str) -> Prepared:
    """Make the copies of the output's gradient ``dout``, contiguous and of its shape, for the backward pass ``kind``."""
    out = result.out
    heads, size = out.shape[-2:]
    batch, device, capacity = len(tiles.lengths), out.device, tiles.capacity
    blocks = tiles.tiles * (TILE // ROWS)
    by_row = torch.empty(heads * capacity, size, dtype=x.v_back.dtype, device=device)
    by_column = torch.empty(heads * size, capacity, dtype=x.q_rows.dtype, device=device)
    delta, scale = (torch.empty(heads * capacity, device=device) for _ in range(2))
    bounds = torch.zeros(batch, heads, blocks, 2, device=device)
    _prepare[(blocks, heads, batch)](
        out, dout, result.p_max, tiles.starts, tiles.lengths, tiles.tiled_starts, x.v_scale, x.v_mean, x.v_norm,
        by_row, by_column, scale, delta, bounds, *strides(out), capacity,
        BACKWARD=kind, TILE=TILE, **copying_launch(size),
    )  # fmt: skip
    return Prepared(by_row, by_column, scale, delta, bounds.amax(2))
