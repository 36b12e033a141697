"""The backward kernels: a preparation of dO, then dK and dV by tiles of keys, and dQ by tiles of queries.

Two kernels recompute P rather than one that adds to dQ from many programs: no atomics, so the same bits every time. The
one for dK and dV computes S^T = K Q^T, so that no result of a matrix product is ever transposed (a transposed one costs
a trip through shared memory, and Triton 3.4 to 3.7.0 compile it wrongly for Hopper).
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from gptface_dist.kernels.attention.emulator import TINY
from gptface_dist.kernels.attention.forward import Launch, columns, resident, resident_vector, rows
from gptface_dist.kernels.attention.options import E4M3_MAX, TILE
from gptface_dist.kernels.attention.quantise import ROWS, Quantised, Tiles, _saturated, copying_launch, strides

_FP8_MAX = tl.constexpr(E4M3_MAX)
_TINY = tl.constexpr(TINY)
_FAR = tl.constexpr(1e30)


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


@triton.jit
def _dk_dv(
    q_rows, q_back, k_rows, v_back, dout_rows, dout_columns, lse, delta, dout_scale, dk, dv,
    starts, lengths, tiled_starts, qk_scale, v_scale, bounds, factor, log2_factor,
    stride_b, stride_t, stride_h, capacity,
    BACKWARD: tl.constexpr, D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, SPECIALIZE: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile of keys and values of one head."""
    tile, head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + sequence)
    end = tl.where(tile * KEYS < length, length, 0)
    first = tl.load(tiled_starts + sequence)
    row, column = head * capacity + first, head * D
    index = sequence * tl.num_programs(1) + head
    q_scale = tl.load(qk_scale + index * 2)
    log2_factor = log2_factor * q_scale * tl.load(qk_scale + index * 2 + 1)
    ds_scale = tl.maximum(tl.load(bounds + index * 2), _TINY) / _FP8_MAX
    p_scale = tl.maximum(tl.load(bounds + index * 2 + 1), _TINY) / _FP8_MAX
    ds_inverse, p_inverse = 1.0 / ds_scale, 1.0 / p_scale
    k = resident(k_rows, row + tile * KEYS, KEYS, D, SPECIALIZE)
    v = resident(v_back, row + tile * KEYS, KEYS, D, SPECIALIZE)
    dk_sum, dv_sum = tl.zeros([KEYS, D], tl.float32), tl.zeros([KEYS, D], tl.float32)
    # Queries beyond the length have lse 1e30, so P = 0 without a mask; keys beyond it are rows that are not stored.
    for m in tl.range(0, end, QUERIES, warp_specialize=SPECIALIZE):
        q = q_rows.load([row + m, 0])
        p = tl.math.exp2(tl.dot(k, tl.trans(q)) * log2_factor - lse.load([row + m])[None, :])
        do = dout_rows.load([row + m, 0])
        dp = tl.dot(v, tl.trans(do))
        if BACKWARD == "bf16":
            dv_sum = tl.dot(p.to(do.dtype), do, dv_sum)
            ds = p * (dp - delta.load([row + m])[None, :])
            dk_sum = tl.dot(ds.to(do.dtype), q_back.load([row + m, 0]), dk_sum)
        else:
            weighted = p * dout_scale.load([row + m])[None, :]
            do8 = dout_columns.load([column, first + m])
            dv_sum = tl.dot((weighted * p_inverse).to(do8.dtype), tl.trans(do8), dv_sum)
            weight = weighted if BACKWARD == "fp8" else p
            ds = weight * (dp - delta.load([row + m])[None, :]) * ds_inverse
            dk_sum = tl.dot(ds.to(do8.dtype), tl.trans(q_back.load([column, first + m])), dk_sum)

    if BACKWARD == "bf16":
        dk_sum = dk_sum * factor
    else:
        dk_sum = dk_sum * (factor * q_scale * ds_scale)
        dv_sum = dv_sum * (p_scale / tl.load(v_scale + index * D + tl.arange(0, D)))[None, :]
    keys = tile * KEYS + tl.arange(0, KEYS)
    place = sequence.to(tl.int64) * stride_b + (tl.load(starts + sequence) + keys)[:, None].to(tl.int64) * stride_t
    place += head * stride_h + tl.arange(0, D)[None, :]
    seen = (keys < length)[:, None]
    tl.store(dk + place, dk_sum.to(dk.dtype.element_ty), mask=seen)
    tl.store(dv + place, dv_sum.to(dv.dtype.element_ty), mask=seen)


@triton.jit
def _dq(
    q_rows, k_rows, k_back, v_back, dout_rows, lse, delta, dout_scale, dq,
    starts, lengths, tiled_starts, qk_scale, bounds, factor, log2_factor,
    stride_b, stride_t, stride_h, capacity,
    BACKWARD: tl.constexpr, D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, SPECIALIZE: tl.constexpr,
):  # fmt: skip
    """Gradient of one tile of queries of one head."""
    tile, head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + sequence)
    end = tl.where(tile * QUERIES < length, length, 0)
    first = tl.load(tiled_starts + sequence)
    row, column = head * capacity + first, head * D
    index = sequence * tl.num_programs(1) + head
    k_scale = tl.load(qk_scale + index * 2 + 1)
    log2_factor = log2_factor * tl.load(qk_scale + index * 2) * k_scale
    ds_scale = tl.maximum(tl.load(bounds + index * 2), _TINY) / _FP8_MAX
    ds_inverse = 1.0 / ds_scale
    mine = row + tile * QUERIES
    q = resident(q_rows, mine, QUERIES, D, SPECIALIZE)
    do = resident(dout_rows, mine, QUERIES, D, SPECIALIZE)
    logsum = resident_vector(lse, mine, QUERIES, SPECIALIZE)[:, None]
    offset = resident_vector(delta, mine, QUERIES, SPECIALIZE)[:, None]
    scale = resident_vector(dout_scale, mine, QUERIES, SPECIALIZE)[:, None]
    dq_sum = tl.zeros([QUERIES, D], tl.float32)
    keys = tl.arange(0, KEYS)[None, :]
    for n in tl.range(0, end, KEYS, warp_specialize=SPECIALIZE):
        scores = tl.dot(q, tl.trans(k_rows.load([row + n, 0]))) * log2_factor
        p = tl.math.exp2(tl.where(n + keys < length, scores, -_FAR) - logsum)
        dp = tl.dot(do, tl.trans(v_back.load([row + n, 0])))
        if BACKWARD == "bf16":
            dq_sum = tl.dot((p * (dp - offset)).to(do.dtype), k_back.load([row + n, 0]), dq_sum)
        else:
            weight = p * scale if BACKWARD == "fp8" else p
            ds = weight * (dp - offset) * ds_inverse
            dq_sum = tl.dot(ds.to(q.dtype), tl.trans(k_back.load([column, first + n])), dq_sum)

    dq_sum = dq_sum * (factor if BACKWARD == "bf16" else factor * k_scale * ds_scale)
    rows = tile * QUERIES + tl.arange(0, QUERIES)
    place = sequence.to(tl.int64) * stride_b + (tl.load(starts + sequence) + rows)[:, None].to(tl.int64) * stride_t
    place += head * stride_h + tl.arange(0, D)[None, :]
    tl.store(dq + place, dq_sum.to(dq.dtype.element_ty), mask=(rows < length)[:, None])


def dk_dv_launch(specialize: bool) -> Launch:
    """Of the kernel for dK and dV, for both head sizes."""
    return Launch(queries=TILE // 2, keys=TILE, specialize=specialize)


def dq_launch(specialize: bool) -> Launch:
    """Of the kernel for dQ, for both head sizes."""
    return Launch(queries=TILE, keys=TILE // 2, specialize=specialize)


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


def backward(
    do: Prepared, x: Quantised, result: Result, tiles: Tiles, factor: float, kind: str, specialize: bool
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, of the output's shape and dtype, zero beyond the lengths.

    Args:
        do: the output's gradient, prepared for the same ``kind``.
        x: the copies, made for the same ``kind``.
        result: of the forward pass.
        tiles: where the sequences lie.
        factor: what the scores are multiplied with, 1 / sqrt(D).
        kind: which products are in FP8, see :class:`Fp8Options`.
        specialize: see :class:`Launch`.
    """
    out = result.out
    heads, size = out.shape[-2:]
    batch, tokens = len(tiles.lengths), tiles.tiles * TILE
    place = (tiles.starts, tiles.lengths, tiles.tiled_starts)
    factors = (factor, factor * math.log2(math.e))
    dq, dk, dv = (torch.zeros_like(out) for _ in range(3))

    def back(copy: Tensor, count: int) -> TensorDescriptor:
        return rows(copy, count) if kind == "bf16" else columns(copy, size, count)

    launch = dk_dv_launch(specialize)
    m, n = launch.queries, launch.keys
    _dk_dv[(triton.cdiv(tokens, n), heads, batch)](
        rows(x.q_rows, m), back(x.q_back, m), x.k_rows, x.v_back,
        rows(do.rows, m), columns(do.columns, size, m), rows(result.lse, m), rows(do.delta, m), rows(do.scale, m),
        dk, dv, *place, x.qk_scale, x.v_scale, do.bounds, *factors, *strides(out), tiles.capacity,
        BACKWARD=kind, D=size, **launch.arguments(),
    )  # fmt: skip
    launch = dq_launch(specialize)
    m, n = launch.queries, launch.keys
    _dq[(triton.cdiv(tokens, m), heads, batch)](
        x.q_rows, rows(x.k_rows, n), back(x.k_back, n), rows(x.v_back, n), do.rows, result.lse, do.delta, do.scale,
        dq, *place, x.qk_scale, do.bounds, *factors, *strides(out), tiles.capacity,
        BACKWARD=kind, D=size, **launch.arguments(),
    )  # fmt: skip
    return dq, dk, dv
