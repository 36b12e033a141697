"""Numerical health of FP8 attention on given tensors: saturation, underflow, and error against bf16."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gptface_dist.kernels.attention import emulator
from gptface_dist.kernels.attention.operator import in_kernel_form
from gptface_dist.kernels.attention.options import E4M3_MAX, Fp8Options

TENSORS = ("q", "k", "v", "p", "dout", "ds", "weights")
"""Names of the tensors that are rounded to FP8: see :data:`emulator.Rounding`."""

RESULTS = ("out", "dq", "dk", "dv")
"""Names of the results that are compared with bf16."""

SIZE = 3 * len(TENSORS) + 2 * len(RESULTS)
"""Number of values that :func:`sums` returns."""


@dataclass(frozen=True)
class Shares:
    """Shares of one tensor's non-zero values, over all tokens and heads, in [0, 1]."""

    saturated: float
    """Rounded down to the largest FP8 value from beyond its rounding range."""
    flushed: float
    """Rounded to zero."""


@dataclass(frozen=True)
class Health:
    """A report on one layer's attention."""

    shares: dict[str, Shares]
    """Shares by name, of those of :data:`TENSORS` that have non-zero values."""
    out_error: float
    """Root mean square of the output's difference from attention in bf16, relative to bf16's."""
    gradient_error: float | None
    """The largest such error of the gradients of q, k, v; None without them."""

    @classmethod
    def of(cls, sums: Tensor) -> "Health":
        """The report from the result of :func:`sums` (float64 [:data:`SIZE`]), or a total of several results."""
        counts, squares = sums[: 3 * len(TENSORS)].reshape(-1, 3).tolist(), sums[3 * len(TENSORS) :].reshape(-1, 2).tolist()
        shares = {
            name: Shares(saturated / total, flushed / total)
            for name, (total, saturated, flushed) in zip(TENSORS, counts, strict=True)
            if total
        }
        # max() would ignore NaN.
        errors = [math.inf if not math.isfinite(a) else math.sqrt(a / max(b, emulator.TINY)) for a, b in squares]
        return cls(shares, errors[0], max(errors[1:]) if any(true for _, true in squares[1:]) else None)


def sums(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, options: Fp8Options, dout: Tensor | None = None) -> Tensor:
    """What :meth:`Health.of` needs of the attention of [B, N, H, D] tensors and int [B] ``lengths``.

    With the output's gradient ``dout``, the backward pass is looked at too. Sums of other sequences or heads may be added.
    Returns float64 [SIZE]: for each of :data:`TENSORS` how many values are not zero, saturate and are flushed to zero; for
    each of :data:`RESULTS` the sum of squares of the difference from bf16, and of bf16's.

    Computed in plain PyTorch, a head at a time, with whole [N, N] matrices: for a reference batch of a few sequences.
    """
    total = torch.zeros(SIZE, dtype=torch.float64, device=q.device)
    for sequence, length in enumerate(lengths.tolist()):
        for head in range(q.shape[2] if length else 0):
            places = (slice(sequence, sequence + 1), slice(length), slice(head, head + 1))
            inputs = [x[places].detach().to(torch.bfloat16) for x in (q, k, v)]
            total += _head(inputs, None if dout is None else dout[places].to(torch.bfloat16), options)
    return total


def health(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, options: Fp8Options, dout: Tensor | None = None) -> Health:
    """:func:`sums` as a report."""
    return Health.of(sums(q, k, v, lengths, options, dout))


def _head(inputs: list[Tensor], dout: Tensor | None, options: Fp8Options) -> Tensor:
    """:func:`sums` of bf16 [1, N, 1, D] tensors without padding."""
    count, size = inputs[0].shape[1], inputs[0].shape[-1]
    counts = {name: torch.zeros(3, dtype=torch.float64, device=inputs[0].device) for name in TENSORS}

    def counted(x: Tensor, name: str) -> Tensor:
        rounded = emulator.round_e4m3(x, name)
        # Half a unit in the last place beyond the largest value still rounds to it.
        parts = (x != 0, x.abs() > E4M3_MAX + 16, (x != 0) & (rounded == 0))
        counts[name] += torch.stack([part.sum() for part in parts])
        return rounded

    def in_fp8(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        form, length = in_kernel_form(q, k, v, options), torch.tensor([count], device=q.device)
        return emulator.emulated_attention(*form, length, 1 / math.sqrt(size), options, counted)[..., :size]

    def in_bf16(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads_first = [x.transpose(1, 2) for x in (q, k, v)]
        return F.scaled_dot_product_attention(heads_first[0], heads_first[1], heads_first[2]).transpose(1, 2)

    pairs = zip(_results(in_fp8, inputs, dout), _results(in_bf16, inputs, dout), strict=True)
    squares = [torch.stack([x.double().square().sum() for x in (a.float() - b.float(), b)]) for a, b in pairs]
    missing = [torch.zeros_like(squares[0])] * (len(RESULTS) - len(squares))
    return torch.cat([*counts.values(), *squares, *missing])


def _results(attention: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: list[Tensor], dout: Tensor | None) -> list[Tensor]:
    """The output, and with its gradient those of the inputs q, k, v."""
    q, k, v = (x.detach().requires_grad_() for x in inputs)
    with torch.enable_grad():
        out = attention(q, k, v)
        return [out.detach(), *(() if dout is None else torch.autograd.grad(out, (q, k, v), dout))]
