"""Inputs of attention as models have them: with outliers, biased channels, peaks and sinks."""

import torch
from torch import Tensor

KINDS = ("normal", "outlier", "channel", "peaked", "sink")


def attention_inputs(kind: str, batch: int, tokens: int, heads: int, size: int, seed: int = 1) -> tuple[Tensor, ...]:
    """q, k, v and the output's gradient, values of bfloat16 in float32, [batch, tokens, heads, size]."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    shape = (batch, tokens, heads, size)
    q, k, v = normal(*shape), normal(*shape), normal(*shape)
    dout = normal(*shape) * torch.exp(0.5 * normal(batch, tokens, heads, 1)) * 1e-4
    if kind == "outlier":
        for x in (q, k, v):
            x += 10 * normal(*shape) * (torch.rand(shape, generator=generator) < 1e-3)
    elif kind == "channel":
        channels = torch.randperm(size, generator=generator)
        k[..., channels[:4]] += torch.tensor([12.0, -9.0, 7.0, -15.0])
        q[..., channels[4:8]] *= 4
        v = v * torch.exp(0.5 * normal(size)) + 0.5 * normal(size)
    elif kind == "peaked":
        q = 2 * q + 0.8 * k[:, torch.randperm(tokens, generator=generator)]
    elif kind == "sink":
        direction = torch.nn.functional.normalize(normal(batch, 1, heads, size), dim=-1)
        q = q + 6 * direction
        k[:, :4] += 8 * direction
        v[:, :4] *= 0.1
    return tuple(x.to(torch.bfloat16).float() for x in (q, k, v, dout))


def relative(found: Tensor, true: Tensor) -> float:
    """Root mean square of the difference as a part of the truth's."""
    return ((found.double() - true.double()).norm() / true.double().norm()).item()
