"""Reconstruction losses that need no trained network, and the learning-rate schedule."""

import math

import torch
from torch import Tensor
from torch.nn import functional

# The binomial kernel of Burt & Adelson 1983 with a = 3/8.
BINOMIAL = (1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)


def blur(pictures: Tensor) -> Tensor:
    """Binomial 5x5 smoothing of [B, C, H, W], borders replicated."""
    channels = pictures.shape[1]
    kernel = pictures.new_tensor(BINOMIAL)
    padded = functional.pad(pictures, (2, 2, 2, 2), mode="replicate")
    rows = functional.conv2d(padded, kernel.view(1, 1, 5, 1).expand(channels, 1, 5, 1), groups=channels)
    return functional.conv2d(rows, kernel.view(1, 1, 1, 5).expand(channels, 1, 1, 5), groups=channels)


def laplacian_pyramid(pictures: Tensor, coarsest: int = 4) -> list[Tensor]:
    """Detail of each octave, finest first, and the rest: [B, C, H, W], [B, C, H/2, W/2], ... down to ``coarsest`` pixels."""
    levels = []
    while min(pictures.shape[-2:]) >= 2 * coarsest:
        smooth = blur(pictures)
        levels.append(pictures - smooth)
        pictures = smooth[:, :, ::2, ::2]
    return [*levels, pictures]


def laplacian_loss(reconstruction: Tensor, original: Tensor) -> Tensor:
    """Sum over octaves of the mean absolute difference of their details.

    The Lap1 loss of Bojanowski et al. 2018 (Optimizing the Latent Space of Generative Networks) up to the levels'
    weights: theirs sum over pixels with a factor 4^j, which per mean is the same weight for every octave, as here.
    A plain pixel loss is dominated by the coarse octaves, which hold nearly all of a picture's variance; this loss weighs
    edges of every size. It is not a learnt perceptual metric.
    """
    pyramids = zip(laplacian_pyramid(reconstruction), laplacian_pyramid(original), strict=True)
    return torch.stack([functional.l1_loss(ours, theirs) for ours, theirs in pyramids]).sum()


def learning_rate(step: int, steps: int, warmup: int, peak: float) -> float:
    """Rate of a step in ``[0, steps)``: a linear rise over ``warmup`` steps, then a cosine that would reach 0 at ``steps``."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
