"""Q, K, V to FP8: QK-norm, means, scales, and the row-wise and transposed copies that the attention kernels read.

Copies are tiled: every head has ``capacity`` rows; each sequence begins at a multiple of TILE there, and the rest of its
last tile is zero. FP8 matrix instructions of Hopper contract contiguous axes only, hence transposed copies [H D, capacity]
beside rows [H capacity, D].
"""

from dataclasses import dataclass, fields

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptface_dist.kernels.attention.emulator import CHANNEL_FLOOR, TINY
from gptface_dist.kernels.attention.options import E4M3_MAX, TILE, Sequences

ROWS = 64
"""Rows of a sequence that one program copies."""

_FP8_MAX = tl.constexpr(E4M3_MAX)
_TINY = tl.constexpr(TINY)
_FLOOR = tl.constexpr(CHANNEL_FLOOR)


@triton.jit
def load_rows(x, offsets, seen, affine, eps, FIRST: tl.constexpr, D: tl.constexpr):
    """Rows [ROWS, D] in float32, zero where not ``seen``; normalised over D where ``affine`` is not None, its rows FIRST and
    FIRST + 1 being weight and bias. Made again wherever Q and K are read, so that no normalised copy is ever written.
    """
    rows = tl.load(x + offsets, mask=seen, other=0.0).to(tl.float32)
    if affine is not None:
        columns = tl.arange(0, D)
        unit, _ = standardised(rows, eps, D)
        weight, bias = tl.load(affine + FIRST * D + columns), tl.load(affine + (FIRST + 1) * D + columns)
        rows = tl.where(seen, unit * weight[None, :] + bias[None, :], 0.0)
    return rows


@triton.jit
def standardised(rows, eps, D: tl.constexpr):
    """Rows [ROWS, D] with mean 0 and variance 1 (less by ``eps``), and what they were multiplied with, [ROWS]."""
    centred = rows - (tl.sum(rows, 1) / D)[:, None]
    inverse = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / D + eps)
    return centred * inverse[:, None], inverse


@triton.jit
def _statistics(
    q, k, v, affine, starts, lengths, partial, eps, stride_b, stride_t, stride_h,
    D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Per block and channel: sum, least and largest of K and of V, largest |Q|. ``partial`` [B, H, blocks, 7, D]."""
    block, head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + sequence)
    if block * ROWS >= length:
        return
    rows, columns = block * ROWS + tl.arange(0, ROWS), tl.arange(0, D)
    seen = (rows < length)[:, None]
    first = sequence.to(tl.int64) * stride_b + tl.load(starts + sequence).to(tl.int64) * stride_t + head * stride_h
    offsets = first + rows[:, None].to(tl.int64) * stride_t + columns[None, :]
    place = ((sequence * tl.num_programs(1) + head).to(tl.int64) * tl.num_programs(0) + block) * 7 * D + columns
    for i in tl.static_range(2):
        if i == 0:
            x = load_rows(k, offsets, seen, affine, eps, 2, D)
        else:
            x = load_rows(v, offsets, seen, None, eps, 0, D)
        tl.store(partial + place + (3 * i) * D, tl.sum(x, 0))
        tl.store(partial + place + (3 * i + 1) * D, tl.min(tl.where(seen, x, float("inf")), 0))
        tl.store(partial + place + (3 * i + 2) * D, tl.max(tl.where(seen, x, float("-inf")), 0))
    x = load_rows(q, offsets, seen, affine, eps, 0, D)
    tl.store(partial + place + 6 * D, tl.max(tl.abs(x), 0))


@triton.jit
def _scales(
    partial, lengths, qk_scale, k_mean, v_mean, v_scale, blocks,
    SMOOTH: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Means and scales of one head of one sequence, of the statistics of its blocks; a fixed order of sums."""
    head, sequence = tl.program_id(0), tl.program_id(1)
    length = tl.load(lengths + sequence)
    columns = tl.arange(0, D)
    index = sequence * tl.num_programs(0) + head
    k_sum, v_sum, q_largest = tl.zeros([D], tl.float32), tl.zeros([D], tl.float32), tl.zeros([D], tl.float32)
    k_least, v_least = tl.full([D], float("inf"), tl.float32), tl.full([D], float("inf"), tl.float32)
    k_most, v_most = tl.full([D], float("-inf"), tl.float32), tl.full([D], float("-inf"), tl.float32)
    for block in range(tl.cdiv(length, ROWS)):
        place = partial + (index.to(tl.int64) * blocks + block) * 7 * D + columns
        k_sum += tl.load(place)
        k_least = tl.minimum(k_least, tl.load(place + D))
        k_most = tl.maximum(k_most, tl.load(place + 2 * D))
        v_sum += tl.load(place + 3 * D)
        v_least = tl.minimum(v_least, tl.load(place + 4 * D))
        v_most = tl.maximum(v_most, tl.load(place + 5 * D))
        q_largest = tl.maximum(q_largest, tl.load(place + 6 * D))
    count = tl.maximum(length, 1).to(tl.float32)
    mean_k = k_sum / count if SMOOTH else tl.zeros([D], tl.float32)
    mean_v = v_sum / count if SMOOTH else tl.zeros([D], tl.float32)
    q_largest = tl.maximum(tl.max(q_largest, 0), _TINY)
    k_largest = tl.max(tl.maximum(tl.maximum(k_most - mean_k, mean_k - k_least), _TINY), 0)
    v_largest = tl.maximum(tl.maximum(v_most - mean_v, mean_v - v_least), 0.0)
    v_largest = tl.maximum(tl.maximum(v_largest, tl.max(v_largest, 0) * _FLOOR), _TINY)
    tl.store(qk_scale + index * 2, q_largest / _FP8_MAX)
    tl.store(qk_scale + index * 2 + 1, k_largest / _FP8_MAX)
    tl.store(k_mean + index * D + columns, mean_k)
    tl.store(v_mean + index * D + columns, mean_v)
    tl.store(v_scale + index * D + columns, v_largest / _FP8_MAX)


@triton.jit
def _write(
    q, k, v, affine, starts, lengths, tiled_starts, qk_scale, k_mean, v_mean, v_scale,
    q_rows, k_rows, v_columns, q_back, k_back, v_back, v_norms, eps, stride_b, stride_t, stride_h, capacity,
    BACKWARD: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One block's copies: rows of Q and K and columns of V for the forward pass, and what the backward pass reads.

    BACKWARD "fp8" and "mixed" want columns of Q and K, "bf16" rows of them; "fp8" wants V's rows in FP8, the others in
    bf16 as they are. "none": there will be no backward pass.
    """
    block, head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + sequence)
    if block * ROWS >= tl.cdiv(length, TILE) * TILE:
        return
    rows, columns = block * ROWS + tl.arange(0, ROWS), tl.arange(0, D)
    seen = (rows < length)[:, None]
    first = sequence.to(tl.int64) * stride_b + tl.load(starts + sequence).to(tl.int64) * stride_t + head * stride_h
    offsets = first + rows[:, None].to(tl.int64) * stride_t + columns[None, :]
    index = sequence * tl.num_programs(1) + head
    tiled = tl.load(tiled_starts + sequence) + rows
    by_row = (head.to(tl.int64) * capacity + tiled[:, None]) * D + columns[None, :]
    by_column = (head.to(tl.int64) * D + columns[None, :]) * capacity + tiled[:, None]
    ELEMENT: tl.constexpr = q_rows.dtype.element_ty

    x = load_rows(q, offsets, seen, affine, eps, 0, D)
    x8 = _saturated(x * (1.0 / tl.load(qk_scale + index * 2)), ELEMENT)
    tl.store(q_rows + by_row, x8)
    if BACKWARD == "fp8" or BACKWARD == "mixed":
        tl.store(q_back + by_column, x8)
    if BACKWARD == "bf16":
        tl.store(q_back + by_row, x.to(q_back.dtype.element_ty))

    x = load_rows(k, offsets, seen, affine, eps, 2, D) - tl.load(k_mean + index * D + columns)[None, :]
    x = tl.where(seen, x, 0.0)
    x8 = _saturated(x * (1.0 / tl.load(qk_scale + index * 2 + 1)), ELEMENT)
    tl.store(k_rows + by_row, x8)
    if BACKWARD == "fp8" or BACKWARD == "mixed":
        tl.store(k_back + by_column, x8)
    if BACKWARD == "bf16":
        tl.store(k_back + by_row, x.to(k_back.dtype.element_ty))

    raw = load_rows(v, offsets, seen, None, eps, 0, D)
    scale = tl.load(v_scale + index * D + columns)[None, :]
    x = tl.where(seen, raw - tl.load(v_mean + index * D + columns)[None, :], 0.0)
    x8 = _saturated(x * (1.0 / scale), ELEMENT)
    tl.store(v_columns + by_column, x8)
    if BACKWARD == "fp8":
        tl.store(v_back + by_row, x8)
    if BACKWARD == "mixed" or BACKWARD == "bf16":
        tl.store(v_back + by_row, raw.to(v_back.dtype.element_ty))
    if BACKWARD == "fp8" or BACKWARD == "mixed":
        x = x8.to(tl.float32) * scale
        place = index.to(tl.int64) * tl.num_programs(0) + block
        tl.store(v_norms + place, tl.sqrt(tl.max(tl.sum(x * x, 1), 0)))


@triton.jit
def _saturated(x, ELEMENT: tl.constexpr):
    """Rounded to ELEMENT, nearest even, with what is too large for e4m3 at its largest value."""
    return tl.clamp(x, -_FP8_MAX, _FP8_MAX).to(ELEMENT)


@dataclass(frozen=True)
class Quantised:
    """What attention reads in place of q, k, v; see the module's docstring for the layout of copies."""

    q_rows: Tensor
    """FP8 [H capacity, D]."""
    k_rows: Tensor
    """FP8 [H capacity, D]: K less its mean."""
    v_columns: Tensor
    """FP8 [H D, capacity]: V less its mean."""
    q_back: Tensor
    """What dK is made of: FP8 [H D, capacity], or bf16 [H capacity, D] where the backward pass is in bf16."""
    k_back: Tensor
    """What dQ is made of: likewise, K less its mean."""
    v_back: Tensor
    """What dP is made of, [H capacity, D]: in FP8 less its mean, or as it is in bf16."""
    qk_scale: Tensor
    """Float32 [B, H, 2]: scales of Q and K."""
    v_scale: Tensor
    """Float32 [B, H, D]."""
    v_mean: Tensor
    """Float32 [B, H, D]."""
    v_norm: Tensor
    """Float32 [B, H]: the largest norm of a token's V less its mean."""

    def tensors(self) -> tuple[Tensor, ...]:
        """The fields in their order."""
        return tuple(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class Tiles:
    """How the sequences lie in the tiled copies."""

    starts: Tensor
    """Int32 [B]: first row of each sequence in its batch row, or in the packed tensor."""
    lengths: Tensor
    """Int32 [B]."""
    tiled_starts: Tensor
    """Int32 [B]: first row in the tiled copies."""
    capacity: int
    """Rows of a head in the tiled copies: what the lengths need at most, whatever they are."""
    tiles: int
    """Tiles of the longest sequence."""

    @classmethod
    def of(cls, sequences: Sequences, tokens: int) -> "Tiles":
        """Of the sequences of a batch with ``tokens`` rows; the device is not waited for."""
        lengths = sequences.lengths
        whole = (lengths + (TILE - 1)) // TILE * TILE
        tiled_starts = (whole.cumsum(0, dtype=torch.int32) - whole).to(torch.int32)
        starts = torch.zeros_like(lengths) if sequences.starts is None else sequences.starts
        capacity = max(capacity_of(tokens, len(lengths)), TILE)
        return cls(starts, lengths, tiled_starts, capacity, triton.cdiv(sequences.longest, TILE))


def capacity_of(tokens: int, sequences: int) -> int:
    """Rows that ``sequences`` need at most, each padded to whole tiles, when they have ``tokens`` rows together."""
    return (tokens // TILE + sequences) * TILE


def copying_launch(size: int) -> dict[str, int]:
    """Keyword arguments of the kernels that copy blocks of rows of heads of ``size``: 32 values a thread."""
    return {"D": size, "ROWS": ROWS, "num_warps": size * ROWS // (32 * 32)}


def strides(x: Tensor) -> tuple[int, int, int]:
    """Of sequence, token and head, for a padded [B, N, H, D] or a packed [T, H, D] tensor."""
    return (0, x.stride(0), x.stride(1)) if x.dim() == 3 else (x.stride(0), x.stride(1), x.stride(2))


def quantise(
    q: Tensor, k: Tensor, v: Tensor, tiles: Tiles, smooth: bool, backward: str, element: torch.dtype,
    affine: Tensor | None = None, eps: float = 0.0,
) -> Quantised:  # fmt: skip
    """Make the copies of q, k, v (same shape and strides, last axis contiguous) for ``backward`` or "none".

    ``element`` is float8_e4m3fn; with float32 nothing is rounded, which tests the algebra apart from FP8. With ``affine``
    (:meth:`QkNorm.affine`) and ``eps``, the copies are those of normalised q and k.
    """
    heads, size, batch, capacity = q.shape[-2], q.shape[-1], len(tiles.lengths), tiles.capacity
    blocks = tiles.tiles * (TILE // ROWS)
    grid, copying = (blocks, heads, batch), copying_launch(size)

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=q.device)

    partial, v_norms = new(batch, heads, blocks, 7, size), torch.zeros(batch, heads, blocks, device=q.device)
    qk_scale, k_mean = new(batch, heads, 2), new(batch, heads, size)
    v_mean, v_scale = new(batch, heads, size), new(batch, heads, size)
    by_row, by_column, none = (heads * capacity, size), (heads * size, capacity), (0,)
    half = torch.bfloat16 if element == torch.float8_e4m3fn else element
    q_rows, k_rows, v_columns = (new(*shape, dtype=element) for shape in (by_row, by_row, by_column))
    back = {"fp8": (by_column, element), "mixed": (by_column, element), "bf16": (by_row, half), "none": (none, element)}
    shape, dtype = back[backward]
    q_back, k_back = new(*shape, dtype=dtype), new(*shape, dtype=dtype)
    v_back = new(*(none if backward == "none" else by_row), dtype=element if backward == "fp8" else half)
    _statistics[grid](q, k, v, affine, tiles.starts, tiles.lengths, partial, eps, *strides(q), **copying)
    _scales[(heads, batch)](
        partial, tiles.lengths, qk_scale, k_mean, v_mean, v_scale, blocks, SMOOTH=smooth, **copying
    )  # fmt: skip
    _write[grid](
        q, k, v, affine, tiles.starts, tiles.lengths, tiles.tiled_starts, qk_scale, k_mean, v_mean, v_scale,
        q_rows, k_rows, v_columns, q_back, k_back, v_back, v_norms, eps, *strides(q), capacity,
        BACKWARD=backward, TILE=TILE, **copying,
    )  # fmt: skip
    return Quantised(
        q_rows, k_rows, v_columns, q_back, k_back, v_back, qk_scale, v_scale, v_mean, v_norms.amax(2)
    )  # fmt: skip
