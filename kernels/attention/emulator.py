"""The FP8 recipe in plain PyTorch: reference for the kernels, rounding for rounding, and the implementation for CPUs.

Everything is float32 but what is named ``...8`` (values of float8_e4m3fn) and what ``backward`` keeps in bf16. The
recipe and its sources: docs/attention.md. Letters of shapes: B sequences, H heads, N tokens, D head size.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gptface_dist.kernels.attention.options import E4M3_MAX, TILE, Fp8Options

P_EXPONENT = 8
"""P is rounded as 2^8 P, which puts its largest value near the largest FP8 value."""

CHANNEL_FLOOR = 1 / 64
"""A channel of V is scaled as if its largest value were at least this part of the largest channel's, so that a dead
channel's scale, which is folded into dO, does not flush its gradient to zero."""

TINY = 1e-30
"""Replaces the largest value of a tensor of zeros."""


def round_e4m3(x: Tensor, _name: str = "") -> Tensor:
    """To the nearest value of float8_e4m3fn, ties to even; what is too large saturates."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float()


def round_bf16(x: Tensor) -> Tensor:
    """To the nearest value of bfloat16."""
    return x.to(torch.bfloat16).float()


Rounding = Callable[[Tensor, str], Tensor]
"""Rounds a scaled tensor to FP8. The second argument is its name: q, k, v, p in the forward pass; dout, ds, weights (P
rescaled for dV) in the backward pass."""


@dataclass(frozen=True)
class State:
    """Tensors of the forward pass that the backward pass needs; float32."""

    q8: Tensor
    """[B, H, N, D]: Q / q_scale in FP8."""
    k8: Tensor
    """[B, H, N, D]: (K - k_mean) / k_scale in FP8."""
    v8: Tensor
    """[B, H, N, D]: (V - v_mean) / v_scale in FP8."""
    q: Tensor
    """[B, H, N, D]: Q."""
    k: Tensor
    """[B, H, N, D]: K - k_mean."""
    v: Tensor
    """[B, H, N, D]: V."""
    q_scale: Tensor
    """[B, H, 1, 1]."""
    k_scale: Tensor
    """[B, H, 1, 1]."""
    v_scale: Tensor
    """[B, H, 1, D]."""
    v_mean: Tensor
    """[B, H, 1, D]."""
    v_norm: Tensor
    """[B, H, 1, 1]: the largest Euclidean norm of a row of v8 v_scale."""
    out: Tensor
    """[B, H, N, D]: attention's output as it was returned."""
    lse: Tensor
    """[B, H, N, 1]: log2 of the sum of 2^(scores log2 e), with FP8-rounded summands."""
    p_max: Tensor
    """[B, H, N, 1]: an upper bound of the row's largest P."""
    seen: Tensor
    """Bool [B, 1, N, 1]: tokens that are no padding."""


def _scale(largest: Tensor) -> tuple[Tensor, Tensor]:
    """The scale that maps the largest FP8 value to ``largest``, and its inverse."""
    scale = largest.clamp(min=TINY) / E4M3_MAX
    return scale, 1 / scale


def _largest_deviation(x: Tensor, mean: Tensor, seen: Tensor) -> Tensor:
    """[B, H, N, D], [B, H, 1, D] -> [B, H, 1, D]: largest |x - mean| of each channel over the tokens; 0 without any."""
    highest = x.masked_fill(~seen, -torch.inf).amax(2, keepdim=True) - mean
    lowest = mean - x.masked_fill(~seen, torch.inf).amin(2, keepdim=True)
    return torch.maximum(highest, lowest).clamp(min=0)


def forward(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, factor: float, options: Fp8Options, round8: Rounding = round_e4m3
) -> tuple[Tensor, State]:  # fmt: skip
    """Attention of [B, N, H, D] tensors and int [B] ``lengths``; ``factor`` multiplies the scores, 1 / sqrt(D).

    Returns [B, N, H, D] in v's dtype, zero beyond the lengths, and the state for :func:`backward`.
    """
    dtype = v.dtype
    seen = (torch.arange(q.shape[1], device=q.device) < lengths.unsqueeze(1))[:, None, :, None]
    q, k, v = (torch.where(seen, x.transpose(1, 2).float(), 0) for x in (q, k, v))
    count = lengths.clamp(min=1)[:, None, None, None]
    k_mean, v_mean = (x.sum(2, keepdim=True) / count * options.smooth for x in (k, v))
    q_scale, q_inverse = _scale(q.abs().amax((2, 3), keepdim=True))
    k_scale, k_inverse = _scale(_largest_deviation(k, k_mean, seen).amax(3, keepdim=True))
    v_largest = _largest_deviation(v, v_mean, seen)
    v_scale, v_inverse = _scale(torch.maximum(v_largest, v_largest.amax(3, keepdim=True) * CHANNEL_FLOOR))
    k = torch.where(seen, k - k_mean, 0)
    q8, k8 = round8(q * q_inverse, "q"), round8(k * k_inverse, "k")
    v8 = round8(torch.where(seen, v - v_mean, 0) * v_inverse, "v")
    v_norm = (v8 * v_scale).square().sum(3, keepdim=True).sqrt().amax(2, keepdim=True)

    scores = q8 @ k8.mT * (q_scale * k_scale * (factor * math.log2(math.e)))
    scores = scores.masked_fill(~seen.mT, -1e30)
    largest, total, mixed = torch.full_like(q[..., :1], -1e30), torch.zeros_like(q[..., :1]), torch.zeros_like(q)
    for start in range(0, q.shape[2], TILE):
        tile = scores[..., start : start + TILE]
        # Whole powers of two: rescaling is exact, and P is rounded on the same grid whatever came before.
        new = torch.maximum(largest, tile.amax(3, keepdim=True).ceil())
        p8 = round8(torch.exp2(tile - (new - P_EXPONENT)), "p")
        shrink = torch.exp2(largest - new)
        total = total * shrink + p8.sum(3, keepdim=True)
        mixed = mixed * shrink + p8 @ v8[:, :, start : start + TILE]
        largest = new
    out = torch.where(seen, mixed / total * v_scale + v_mean, 0).to(dtype)
    lse = torch.where(seen, largest + torch.log2(total) - P_EXPONENT, 1e30)
    p_max = torch.where(seen, 2.0**P_EXPONENT / total, 0)
    state = State(q8, k8, v8, q, k, v, q_scale, k_scale, v_scale, v_mean, v_norm, out.float(), lse, p_max, seen)
    return out.transpose(1, 2), state


def backward(
    dout: Tensor, state: State, factor: float, options: Fp8Options, round8: Rounding = round_e4m3
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, float32 [B, N, H, D], for the gradient ``dout`` [B, N, H, D] of the output."""
    s = state
    dout = torch.where(s.seen, dout.transpose(1, 2).float(), 0)
    centred = torch.where(s.seen, s.out - s.v_mean, 0)
    log2_factor = s.q_scale * s.k_scale * (factor * math.log2(math.e))
    p = torch.exp2((s.q8 @ s.k8.mT * log2_factor).masked_fill(~s.seen.mT, -1e30) - s.lse)

    if options.backward == "bf16":
        dout = round_bf16(dout)
        ds = p * (dout @ round_bf16(s.v).mT - (dout * s.out).sum(3, keepdim=True))
        ds, dv = round_bf16(ds), round_bf16(p).mT @ dout
        dq, dk = ds @ round_bf16(s.k), ds.mT @ round_bf16(s.q)
        return _rows(dq * factor, dk * factor, dv)

    # dO with V's scales folded in, so that dP needs no more than one scale a row.
    dout_scale, dout_inverse = _scale((dout * s.v_scale).abs().amax(3, keepdim=True))
    dout8 = round8(dout * s.v_scale * dout_inverse, "dout")
    weighted = p * dout_scale
    if options.backward == "fp8":
        # The very dO that dP is made of: then the row sums of dS vanish as they do in exact arithmetic.
        known = dout8 / s.v_scale * dout_scale
        delta = (dout8 / s.v_scale * centred).sum(3, keepdim=True)
        ds = weighted * (dout8 @ s.v8.mT - delta)
    else:
        known = round_bf16(dout)
        delta = (known * s.out).sum(3, keepdim=True)
        ds = p * (known @ round_bf16(s.v).mT - delta)
    # Cauchy-Schwarz: |dP - delta| = |dO (v - o)| <= |dO| (max |v| + |o|), all taken from V's mean.
    bound = norm(known) * (s.v_norm + norm(centred)) * s.p_max
    ds_scale, ds_inverse = _scale(bound.amax((2, 3), keepdim=True))
    ds8 = round8(ds * ds_inverse, "ds")
    p_scale, p_inverse = _scale((s.p_max * dout_scale).amax((2, 3), keepdim=True))
    dv = round8(weighted * p_inverse, "weights").mT @ dout8 * (p_scale / s.v_scale)
    dq = ds8 @ s.k8 * (factor * s.k_scale * ds_scale)
    dk = ds8.mT @ s.q8 * (factor * s.q_scale * ds_scale)
    return _rows(dq, dk, dv)


def norm(x: Tensor) -> Tensor:
    """[.., D] -> [.., 1]: Euclidean norm."""
    return x.square().sum(-1, keepdim=True).sqrt()


def _rows(dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


class _Emulated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, *how: Any) -> Tensor:
        ctx.save_for_backward(q, k, v, lengths)
        ctx.how = how
        return forward(q, k, v, lengths, *how)[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, lengths = ctx.saved_tensors
        # The state is a function of q, k, v: recomputed instead of stored.
        _, state = forward(q, k, v, lengths, *ctx.how)
        d_inputs = backward(gradients[0], state, *ctx.how)
        return *(x.to(q.dtype) for x in d_inputs), None, None, None, None


def emulated_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, factor: float, options: Fp8Options, round8: Rounding = round_e4m3
) -> Tensor:  # fmt: skip
    """:func:`forward`'s output, whose gradients are :func:`backward`'s."""
    out: Tensor = _Emulated.apply(q, k, v, lengths, factor, options, round8)
    return out
