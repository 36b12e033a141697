"""Inputs of attention as models have them: with outliers, biased channels, peaks and sinks."""

import torch
from torch import Tensor

KINDS = ("normal", "outlier", "channel", "peaked", "sink")


def attention_inputs(kind: str, batch: int, tokens: int, heads: int, size: int, seed: int) -> list[Tensor]:
    """q, k, v and the output's gradient, bfloat16 [batch, tokens, heads, size]."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    shape = (batch, tokens, heads, size)
    q, k, v = normal(*shape), normal(*shape), normal(*shape)
    # Gradients are small, and some tokens' are larger than others'.
    dout = normal(*shape) * torch.exp(0.5 * normal(batch, tokens, heads, 1)) * 1e-4
    if kind == "outlier":
        q, k, v = (x + 10 * normal(*shape) * (torch.rand(shape, generator=generator) < 1e-3) for x in (q, k, v))
    elif kind == "channel":
        channels = torch.randperm(size, generator=generator)
        k[..., channels[:4]] += torch.tensor([12.0, -9.0, 7.0, -15.0])
        q[..., channels[4:8]] *= 4
        v = v * torch.exp(0.5 * normal(size)) + 0.5 * normal(size)
    elif kind == "peaked":
        q = 2 * q + 0.8 * k[:, torch.randperm(tokens, generator=generator)]
    elif kind == "sink":
        direction = torch.nn.functional.normalize(normal(batch, 1, heads, size), dim=-1)
        sink = torch.arange(tokens)[None, :, None, None] < 4
        q, k, v = q + 6 * direction, torch.where(sink, k + 8 * direction, k), torch.where(sink, 0.1 * v, v)
    return [x.bfloat16() for x in (q, k, v, dout)]
