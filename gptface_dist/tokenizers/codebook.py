"""Vector quantisation: the nearest code, the losses that train a codebook, and the revival of dead codes.

diffusers' ``VectorQuantizer`` (0.42.1) holds the codebook (``model.quantize.embedding``), but is not run, for three reasons:
``VQModel`` builds it with ``legacy=True``, which puts the factor 0.25 on the codebook's side of the loss instead of on the
encoder's; its ``torch.cdist`` in float32 may turn near ties either way with the number of rows; and its straight-through sum
``z + (e - z)`` differs from ``e`` in the last bits, so that decoding stored codes would not repeat what training saw.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

# Distances in memory at once: 2^24 float64 are 128 MiB.
DISTANCES = 1 << 24


@dataclass(frozen=True)
class Quantised:
    """Latents after quantisation."""

    latents: Tensor
    """float32 [B, D, H, W]: each position's code vector; gradients pass straight through to the encoder."""
    codes: Tensor
    """int64 [B, H, W]: index of each position's code vector."""
    codebook_loss: Tensor
    """Mean of ``(sg(z) - e)^2``: moves codes towards the encoder's outputs."""
    commitment_loss: Tensor
    """Mean of ``(z - sg(e))^2``: moves the encoder's outputs towards codes."""


class _StraightThrough(torch.autograd.Function):
    """Forward: the code vectors, to the bit. Backward: the gradient goes to the encoder's output unchanged."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, latents: Tensor, vectors: Tensor) -> Tensor:
        return vectors.clone()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


@torch.no_grad()
def nearest(latents: Tensor, codebook: Tensor) -> Tensor:
    """The nearest code (Euclidean) of each row: [N, D], [K, D] -> int64 [N].

    In float64, so that the result depends on the row alone and not on the rounding of a matrix product.
    """
    book = codebook.double()
    offsets = book.square().sum(1)
    rows = max(1, DISTANCES // len(book))
    parts = [torch.addmm(offsets, part.double(), book.T, alpha=-2).argmin(1) for part in latents.split(rows)]
    return torch.cat(parts)


def quantise(latents: Tensor, codebook: Tensor) -> Quantised:
    """Quantise float32 [B, D, H, W] with the codebook [K, D]."""
    rows = latents.permute(0, 2, 3, 1)
    codes = nearest(rows.reshape(-1, rows.shape[-1]), codebook).view(rows.shape[:-1])
    vectors = functional.embedding(codes, codebook)
    quantised: Tensor = _StraightThrough.apply(rows, vectors.detach())
    return Quantised(
        quantised.permute(0, 3, 1, 2).contiguous(),
        codes,
        functional.mse_loss(vectors, rows.detach()),
        functional.mse_loss(rows, vectors.detach()),
    )


def histogram(codes: Tensor, size: int) -> Tensor:
    """Number of occurrences of each code: int64 [size]."""
    return torch.bincount(codes.flatten(), minlength=size)


def share_used(counts: Tensor) -> float:
    """Share of the codes with a count above 0."""
    return float((counts > 0).float().mean())


def perplexity(counts: Tensor) -> float:
    """``exp`` of the entropy of the codes' frequencies: the number of equally frequent codes with the same entropy."""
    frequencies = counts.double() / counts.sum().clamp(min=1)
    return float(torch.special.entr(frequencies).sum().exp())


def choose_rows(total: int, count: int, seed: int, step: int) -> Tensor:
    """``count`` of ``total`` positions, int64 [count]: a function of the arguments alone, distinct while there are enough."""
    generator = torch.Generator().manual_seed(hash_seed(seed, step))
    if count <= total:
        return torch.randperm(total, generator=generator)[:count]
    return torch.randint(total, (count,), generator=generator)


def hash_seed(seed: int, step: int) -> int:
    """One 63-bit seed from two numbers; neighbours do not collide (SplitMix64's finaliser)."""
    mask = (1 << 64) - 1
    value = (seed * 0x9E3779B97F4A7C15 + step + 1) & mask
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
    return (value ^ (value >> 31)) >> 1
