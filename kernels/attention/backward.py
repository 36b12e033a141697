"""The kernels of the gradients: dK and dV by tiles of keys, and dQ by tiles of queries.

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
from gptface_dist.kernels.attention.forward import columns, resident, resident_vector, rows
from gptface_dist.kernels.attention.launch import DK_DV, DQ, Launch, LaunchTable
from gptface_dist.kernels.attention.options import E4M3_MAX, TILE
from gptface_dist.kernels.attention.prepare import Prepared, Result
from gptface_dist.kernels.attention.quantise import Quantised, Tiles, standardised, strides

_FP8_MAX = tl.constexpr(E4M3_MAX)
_TINY = tl.constexpr(TINY)
_FAR = tl.constexpr(1e30)


@triton.jit
def _through_norm(dy, raw, place, seen, affine, partial, eps, FIRST: tl.constexpr, D: tl.constexpr):
    """The gradient [ROWS, D] of what QK-norm was given, of the gradient ``dy`` of what it gave; ``partial`` [2, D] gets this
    tile's part of the gradients of its weight and bias.
    """
    columns = tl.arange(0, D)
    unit, inverse = standardised(tl.load(raw + place, mask=seen, other=0.0).to(tl.float32), eps, D)
    dy = tl.where(seen, dy, 0.0)
    tl.store(partial + columns, tl.sum(dy * unit, 0))
    tl.store(partial + D + columns, tl.sum(dy, 0))
    dunit = dy * tl.load(affine + FIRST * D + columns)[None, :]
    along = tl.sum(dunit * unit, 1) / D
    return (dunit - (tl.sum(dunit, 1) / D)[:, None] - unit * along[:, None]) * inverse[:, None]


@triton.jit
def _add_gradients(
    weights, ds, q_back, dout_rows, dout_columns, row, column, first, m, dv_sum, dk_sum, BACKWARD: tl.constexpr
):  # fmt: skip
    """The sums of dV and dK with the part of the tile of queries from ``m`` on: P^T dO and dS^T Q."""
    if BACKWARD == "bf16":
        dv_sum = tl.dot(weights, dout_rows.load([row + m, 0]), dv_sum)
        dk_sum = tl.dot(ds, q_back.load([row + m, 0]), dk_sum)
    else:
        dv_sum = tl.dot(weights, tl.trans(dout_columns.load([column, first + m])), dv_sum)
        dk_sum = tl.dot(ds, tl.trans(q_back.load([column, first + m])), dk_sum)
    return dv_sum, dk_sum


@triton.jit
def _dk_dv(
    q_rows, q_back, k_rows, v_back, dout_rows, dout_columns, lse, delta, dout_scale, dk, dv, raw, affine, partial,
    starts, lengths, tiled_starts, qk_scale, v_scale, bounds, factor, log2_factor, eps,
    stride_b, stride_t, stride_h, raw_b, raw_t, raw_h, capacity,
    BACKWARD: tl.constexpr, D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, OVERLAP: tl.constexpr,
    SPECIALIZE: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile of keys and values of one head.

    With QK-norm, ``raw`` is K before it and ``partial`` [B, H, tiles, 2, D] gets the norm's gradients. (Not with specialised
    warps, among which Triton 3.7.1 cannot share out sums over rows.)
    """
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
    KIND: tl.constexpr = v_back.dtype.element_ty if BACKWARD == "bf16" else k_rows.dtype.element_ty
    weights, ds = tl.zeros([KEYS, QUERIES], KIND), tl.zeros([KEYS, QUERIES], KIND)
    # Queries beyond the length have lse 1e30, so P = 0 without a mask; keys beyond it are rows that are not stored.
    for m in tl.range(0, end, QUERIES, warp_specialize=SPECIALIZE):
        if OVERLAP:
            # The tile before's; the first time around, nothing times the first tile. Were they computed below, what the
            # second of them reads would be made while the first runs, and ptxas would then let no two products overlap.
            before = tl.maximum(m - QUERIES, 0)
            dv_sum, dk_sum = _add_gradients(
                weights, ds, q_back, dout_rows, dout_columns, row, column, first, before, dv_sum, dk_sum, BACKWARD
            )
        p = tl.math.exp2(tl.dot(k, tl.trans(q_rows.load([row + m, 0]))) * log2_factor - lse.load([row + m])[None, :])
        dp = tl.dot(v, tl.trans(dout_rows.load([row + m, 0]))) - delta.load([row + m])[None, :]
        if BACKWARD == "bf16":
            weights = p.to(KIND)
            ds = (p * dp).to(KIND)
        else:
            weighted = p * dout_scale.load([row + m])[None, :]
            weights = (weighted * p_inverse).to(KIND)
            ds = ((weighted if BACKWARD == "fp8" else p) * dp * ds_inverse).to(KIND)
        if not OVERLAP:
            dv_sum, dk_sum = _add_gradients(
                weights, ds, q_back, dout_rows, dout_columns, row, column, first, m, dv_sum, dk_sum, BACKWARD
            )
    if OVERLAP:
        last = tl.maximum(tl.cdiv(end, QUERIES) - 1, 0) * QUERIES
        dv_sum, dk_sum = _add_gradients(
            weights, ds, q_back, dout_rows, dout_columns, row, column, first, last, dv_sum, dk_sum, BACKWARD
        )

    if BACKWARD == "bf16":
        dk_sum = dk_sum * factor
    else:
        dk_sum = dk_sum * (factor * q_scale * ds_scale)
        dv_sum = dv_sum * (p_scale / tl.load(v_scale + index * D + tl.arange(0, D)))[None, :]
    keys = tile * KEYS + tl.arange(0, KEYS)
    at = (tl.load(starts + sequence) + keys)[:, None].to(tl.int64)
    place = sequence.to(tl.int64) * stride_b + at * stride_t + head * stride_h + tl.arange(0, D)[None, :]
    seen = (keys < length)[:, None]
    tl.store(dv + place, dv_sum.to(dv.dtype.element_ty), mask=seen)
    if affine is not None:
        given = sequence.to(tl.int64) * raw_b + at * raw_t + head * raw_h + tl.arange(0, D)[None, :]
        partial += (index.to(tl.int64) * tl.num_programs(0) + tile) * 2 * D
        dk_sum = _through_norm(dk_sum, raw, given, seen, affine, partial, eps, 2, D)
    tl.store(dk + place, dk_sum.to(dk.dtype.element_ty), mask=seen)


@triton.jit
def _dq(
    q_rows, k_rows, k_back, v_back, dout_rows, lse, delta, dout_scale, dq, raw, affine, partial,
    starts, lengths, tiled_starts, qk_scale, bounds, factor, log2_factor, eps,
    stride_b, stride_t, stride_h, raw_b, raw_t, raw_h, capacity,
    BACKWARD: tl.constexpr, D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, OVERLAP: tl.constexpr,
    SPECIALIZE: tl.constexpr,
):  # fmt: skip
    """Gradient of one tile of queries of one head; ``raw`` and ``partial`` as in :func:`_dk_dv`, of Q."""
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
    query_row = row + tile * QUERIES
    q = resident(q_rows, query_row, QUERIES, D, SPECIALIZE)
    do = resident(dout_rows, query_row, QUERIES, D, SPECIALIZE)
    logsum = resident_vector(lse, query_row, QUERIES, SPECIALIZE)[:, None]
    offset = resident_vector(delta, query_row, QUERIES, SPECIALIZE)[:, None]
    scale = resident_vector(dout_scale, query_row, QUERIES, SPECIALIZE)[:, None]
    dq_sum = tl.zeros([QUERIES, D], tl.float32)
    keys = tl.arange(0, KEYS)[None, :]
    if OVERLAP:
        products = tl.dot(q, tl.trans(k_rows.load([row, 0])))
    for n in tl.range(0, end, KEYS, warp_specialize=SPECIALIZE):
        if OVERLAP:
            # As in the forward kernel.
            upcoming = tl.dot(q, tl.trans(k_rows.load([row + n + KEYS, 0])))
        else:
            products = tl.dot(q, tl.trans(k_rows.load([row + n, 0])))
        p = tl.math.exp2(tl.where(n + keys < length, products * log2_factor, -_FAR) - logsum)
        dp = tl.dot(do, tl.trans(v_back.load([row + n, 0])))
        if BACKWARD == "bf16":
            dq_sum = tl.dot((p * (dp - offset)).to(do.dtype), k_back.load([row + n, 0]), dq_sum)
        else:
            weight = p * scale if BACKWARD == "fp8" else p
            ds = weight * (dp - offset) * ds_inverse
            dq_sum = tl.dot(ds.to(q.dtype), tl.trans(k_back.load([column, first + n])), dq_sum)
        if OVERLAP:
            products = upcoming

    dq_sum = dq_sum * (factor if BACKWARD == "bf16" else factor * k_scale * ds_scale)
    rows = tile * QUERIES + tl.arange(0, QUERIES)
    at = (tl.load(starts + sequence) + rows)[:, None].to(tl.int64)
    place = sequence.to(tl.int64) * stride_b + at * stride_t + head * stride_h + tl.arange(0, D)[None, :]
    seen = (rows < length)[:, None]
    if affine is not None:
        given = sequence.to(tl.int64) * raw_b + at * raw_t + head * raw_h + tl.arange(0, D)[None, :]
        partial += (index.to(tl.int64) * tl.num_programs(0) + tile) * 2 * D
        dq_sum = _through_norm(dq_sum, raw, given, seen, affine, partial, eps, 0, D)
    tl.store(dq + place, dq_sum.to(dq.dtype.element_ty), mask=seen)


@dataclass(frozen=True)
class Normalised:
    """What QK-norm was given and did."""

    q: Tensor
    """Queries before it, of the output's shape, last axis contiguous."""
    k: Tensor
    """Keys before it, with the queries' strides."""
    affine: Tensor
    """Float32 [4, D]: see :meth:`QkNorm.affine`."""
    eps: float
    """The norm's."""


@dataclass(frozen=True)
class Inputs:
    """What both kernels of the gradients are given."""

    do: Prepared
    """The output's gradient, prepared for the same ``kind``."""
    x: Quantised
    """The copies, made for the same ``kind``."""
    result: Result
    """Of the forward pass."""
    tiles: Tiles
    """Where the sequences lie."""
    factor: float
    """What the scores are multiplied with, 1 / sqrt(D)."""
    kind: str
    """Which products are in FP8, see :class:`Fp8Options`."""
    norm: Normalised | None = None
    """What the copies were normalised by; None where they were not."""

    def back(self, copy: Tensor, count: int) -> TensorDescriptor:
        """Blocks of ``count`` tokens of what dK or dQ is made of."""
        return rows(copy, count) if self.kind == "bf16" else columns(copy, self.result.out.shape[-1], count)

    def grid(self, count: int) -> tuple[int, int, int]:
        """Programs, where each has ``count`` tokens of a head."""
        return self.tiles.tiles * TILE // count, self.result.out.shape[-2], len(self.tiles.lengths)

    def norm_part(self, grid: tuple[int, int, int]) -> Tensor | None:
        """Where programs leave their parts of the norm's gradients."""
        out = self.result.out
        return None if self.norm is None else torch.empty(*grid[::-1], 2, out.shape[-1], device=out.device)

    def scalars(self) -> tuple[float | int, ...]:
        """Factors, epsilon, strides and capacity, in the order of the kernels' arguments."""
        eps, raw = (0.0, (0, 0, 0)) if self.norm is None else (self.norm.eps, strides(self.norm.q))
        out = self.result.out
        return self.factor, self.factor * math.log2(math.e), eps, *strides(out), *raw, self.tiles.capacity


def dk_dv(given: Inputs, launch: Launch) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of k and v, of the output's shape and dtype, zero beyond the lengths; and of the keys' norm, float32
    [B, H, programs, 2, D], parts of a sum; None without one.
    """
    do, x, result, tiles, norm = given.do, given.x, given.result, given.tiles, given.norm
    size, m, n = result.out.shape[-1], launch.queries, launch.keys
    dk, dv = torch.zeros_like(result.out), torch.zeros_like(result.out)
    grid = given.grid(n)
    part = given.norm_part(grid)
    _dk_dv[grid](
        rows(x.q_rows, m), given.back(x.q_back, m), x.k_rows, x.v_back,
        rows(do.rows, m), columns(do.columns, size, m), rows(result.lse, m), rows(do.delta, m), rows(do.scale, m),
        dk, dv, None if norm is None else norm.k, None if norm is None else norm.affine, part,
        tiles.starts, tiles.lengths, tiles.tiled_starts, x.qk_scale, x.v_scale, do.bounds, *given.scalars(),
        BACKWARD=given.kind, D=size, **launch.arguments(),
    )  # fmt: skip
    return dk, dv, part


def dq(given: Inputs, launch: Launch) -> tuple[Tensor, Tensor | None]:
    """Gradient of q, and of the queries' norm, as those of :func:`dk_dv`."""
    do, x, result, tiles, norm = given.do, given.x, given.result, given.tiles, given.norm
    size, m, n = result.out.shape[-1], launch.queries, launch.keys
    gradient = torch.zeros_like(result.out)
    grid = given.grid(m)
    part = given.norm_part(grid)
    _dq[grid](
        x.q_rows, rows(x.k_rows, n), given.back(x.k_back, n), rows(x.v_back, n), do.rows, result.lse, do.delta, do.scale,
        gradient, None if norm is None else norm.q, None if norm is None else norm.affine, part,
        tiles.starts, tiles.lengths, tiles.tiled_starts, x.qk_scale, do.bounds, *given.scalars(),
        BACKWARD=given.kind, D=size, **launch.arguments(),
    )  # fmt: skip
    return gradient, part


def backward(given: Inputs, table: LaunchTable, specialize: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, of the output's shape and dtype, zero beyond the lengths; and of the norm's ``affine``, float32
    [4, D], or empty without a norm.
    """
    size = given.result.out.shape[-1]
    dk, dv, k_part = dk_dv(given, table.of(DK_DV, size, given.kind, specialize))
    d_q, q_part = dq(given, table.of(DQ, size, given.kind, specialize))
    affine = [part.sum((0, 1, 2)) for part in (q_part, k_part) if part is not None]
    return d_q, dk, dv, torch.cat(affine) if affine else d_q.new_empty(0, dtype=torch.float32)
