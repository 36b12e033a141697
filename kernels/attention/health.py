"""How FP8 attention fares on given tensors: what saturates, what vanishes, and how far the result is from bf16's."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gptface_dist.kernels.attention import emulator
from gptface_dist.kernels.attention.operator import in_kernel_form
from gptface_dist.kernels.attention.options import E4M3_MAX, Fp8Options


@dataclass(frozen=True)
class Shares:
    """Parts of the values of one tensor that are not zero, over all tokens and heads."""

    saturated: float
    """Rounded down to the largest FP8 value from beyond its rounding range."""
    flushed: float
    """Rounded to zero."""


@dataclass(frozen=True)
class Health:
    """A report on one layer's attention."""

    shares: dict[str, Shares]
    """Of each tensor in FP8, by the names of :data:`emulator.Rounding`."""
    out_error: float
    """Root mean square of the output's difference from attention in bf16, as a part of bf16's."""
    gradient_error: float | None
    """The largest such error of the gradients of q, k, v; None without the output's gradient."""


def health(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, options: Fp8Options, dout: Tensor | None = None) -> Health:
    """Report on the attention of [B, N, H, D] tensors and int [B] ``lengths``, with the output's gradient if there is one.

    Computed in plain PyTorch with whole [B, H, N, N] matrices: for a probe of a few sequences now and then.
    """
    factor = 1 / math.sqrt(q.shape[-1])
    counts: dict[str, list[int]] = {}

    def counted(x: Tensor, name: str) -> Tensor:
        rounded = emulator.round_e4m3(x, name)
        # Half a unit in the last place beyond the largest value still rounds to it.
        parts = (x != 0, x.abs() > E4M3_MAX + 16, (x != 0) & (rounded == 0))
        found = counts.setdefault(name, [0, 0, 0])
        counts[name] = [total + int(part.sum()) for total, part in zip(found, parts, strict=True)]
        return rounded

    def in_fp8(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        form = in_kernel_form(q, k, v, options)
        return emulator.emulated_attention(*form, lengths, factor, options, counted)[..., : q.shape[-1]]

    seen = (torch.arange(q.shape[1], device=q.device) < lengths.unsqueeze(1))[:, :, None, None]

    def in_bf16(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        attended = F.scaled_dot_product_attention(*heads_first, attn_mask=seen.permute(0, 2, 3, 1))  # type: ignore[misc,arg-type]
        return torch.where(seen, attended.transpose(1, 2), 0)

    inputs = [torch.where(seen, x.detach(), 0).to(torch.bfloat16) for x in (q, k, v)]
    weights = None if dout is None else torch.where(seen, dout, 0).to(torch.bfloat16)
    pairs = zip(_results(in_fp8, inputs, weights), _results(in_bf16, inputs, weights), strict=True)
    out, *gradients = [_difference(found, true) for found, true in pairs]
    shares = {
        name: Shares(saturated / max(total, 1), flushed / max(total, 1)) for name, (total, saturated, flushed) in counts.items()
    }
    return Health(shares, out, max(gradients, default=None))


def _results(attention: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: list[Tensor], dout: Tensor | None) -> list[Tensor]:
    """The output, and with its gradient those of the inputs q, k, v."""
    q, k, v = (x.detach().requires_grad_() for x in inputs)
    with torch.enable_grad():
        out = attention(q, k, v)
        return [out.detach(), *(() if dout is None else torch.autograd.grad(out, (q, k, v), dout))]


def _difference(found: Tensor, true: Tensor) -> float:
    found, true = found.float(), true.float()
    return float((found - true).norm() / true.norm().clamp(min=emulator.TINY))
