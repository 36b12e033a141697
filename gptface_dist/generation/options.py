"""Options of sampling, and of guidance towards the text. Imports no torch.

Each field is an option of `gptface generate`, `edit` and `caption`, by its key in :class:`GenerationOptions`.
"""

import math
from dataclasses import dataclass, field

from gptface_dist.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """Iterative parallel decoding (Chang et al. 2022, MaskGIT)."""

    steps: int = 12
    """Passes of the model; each commits some of the tokens, few at first (cosine law)."""
    temperature: float = 1.0
    """Divides the logits before a token is drawn; 0 takes the likeliest."""
    top_k: int = 0
    """Draws among this many likeliest tokens; 0: among all."""
    confidence_noise: float = 4.5
    """Factor of the Gumbel noise on the confidence that decides which tokens are committed; falls to 0 linearly."""
    seed: int = 0
    """Key of the noise, 0 to 2**63 - 1; the noise of sample ``i`` of a call is a function of (seed, i)."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserError(f"sampling.steps must be at least 1, not {self.steps}")
        for name in ("temperature", "confidence_noise"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"sampling.{name} must be a number and not negative, not {getattr(self, name)}")
        if self.top_k < 0:
            raise UserError(f"sampling.top_k must be 0 (all tokens) or more, not {self.top_k}")
        if not 0 <= self.seed < 1 << 63:
            raise UserError(f"sampling.seed must be within 0 and 2**63 - 1, not {self.seed}")


@dataclass(frozen=True)
class Gradient:
    """Guidance by the gradient of the image-text matching loss, after Dathathri et al. 2020 (PPLM)."""

    strength: float = 0.0
    """Length of each step on the logits, as root mean square over the tokens' logits; 0: no guidance."""
    iterations: int = 3
    """Steps along the gradient before each commitment."""
    kl: float = 0.01
    """Weight of the divergence of the changed distribution from the model's own."""
    fusion: float = 0.9
    """Exponent of the changed distribution, 0 to 1: tokens are drawn from ``changed^fusion * own^(1 - fusion)``."""

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise UserError(f"guidance.gradient.iterations must be at least 1, not {self.iterations}")
        for name in ("strength", "kl"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"guidance.gradient.{name} must be a number and not negative, not {getattr(self, name)}")
        if not 0 <= self.fusion <= 1:
            raise UserError(f"guidance.gradient.fusion must be within 0 and 1, not {self.fusion}")


@dataclass(frozen=True)
class Guidance:
    """Guidance of samples towards the text. The default is none: exactly the model's own distribution."""

    gradient: Gradient = field(default_factory=Gradient)
    """Guidance by the gradient of the matching loss."""
    classifier_free: float = 0.0
    """Strength ``s`` of classifier-free guidance (Ho and Salimans 2022): logits ``c + s (c - u)``, ``u`` without the text.
    Pictures only; captions refuse it."""
    rerank: int = 1
    """Candidates drawn for each result, of which the best match is kept."""

    def __post_init__(self) -> None:
        if not 0 <= self.classifier_free < math.inf:
            raise UserError(f"guidance.classifier_free must be a number and not negative, not {self.classifier_free}")
        if self.rerank < 1:
            raise UserError(f"guidance.rerank must be at least 1, not {self.rerank}")


@dataclass(frozen=True)
class GenerationOptions:
    """All options of one call."""

    sampling: Sampling = field(default_factory=Sampling)
    guidance: Guidance = field(default_factory=Guidance)
