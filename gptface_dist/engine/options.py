"""Options of the engine, readable where neither DeepSpeed nor megatron-core is installed."""

from dataclasses import dataclass


@dataclass(frozen=True)
class OptimizerOptions:
    """AdamW and clipping."""

    lr: float = 1e-3
    """Learning rate."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled weight decay; not of norms, biases and embeddings."""
    clip: float = 1.0
    """Largest norm of the whole gradient; 0 does not clip."""


@dataclass(frozen=True)
class LossWeights:
    """Factors of the three losses."""

    text: float = 1.0
    """Masked text tokens."""
    image: float = 1.0
    """Masked image tokens."""
    match: float = 1.0
    """Image-text matching."""
