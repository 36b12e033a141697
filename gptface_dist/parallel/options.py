"""Options of the engine, readable where neither DeepSpeed nor megatron-core is installed."""

from dataclasses import dataclass, field

import torch

from gptface_dist.errors import check_one_of
from gptface_dist.model.attention import AttentionOptions


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
    max_grad_norm: float = 1.0
    """Largest norm of the whole gradient; 0 does not clip."""


LEGAL = {
    "dtype": ("float32", "bfloat16"),
    "recompute": ("none", "attention", "layer"),
    "spec": ("local", "transformer_engine"),
    "fp8": ("none", "e4m3", "hybrid"),
    "fp8_recipe": ("delayed", "tensorwise", "blockwise", "mxfp8"),
    "norm": ("torch", "apex"),
    "optimizer": ("torch", "apex"),
}
"""Values of :class:`EngineOptions`."""


@dataclass(frozen=True)
class EngineOptions:
    """How a step is computed; what is computed stays the same, but for rounding."""

    dtype: str = "float32"
    """Of weights and activations: ``float32`` or ``bfloat16``. The optimizer always keeps weights and moments in float32."""

    recompute: str = "none"
    """What the backward pass computes again to save memory: ``none``; ``attention``, which is what lies between queries, keys,
    values and the projection; or whole layers (``layer``), of which the input alone is kept."""

    spec: str = "local"
    """Who makes linear layers: megatron-core (``local``), or ``transformer_engine`` where that package is installed."""
    fp8: str = "none"
    """Transformer Engine's FP8 format: ``e4m3``, or ``hybrid``, which takes e5m2 for gradients; ``none`` for no FP8."""
    fp8_recipe: str = "delayed"
    """Transformer Engine's way of scaling to FP8: ``delayed``, ``tensorwise``, ``blockwise`` or ``mxfp8``."""
    norm: str = "torch"
    """Who makes norms: ``torch``, or NVIDIA's ``apex`` where that is installed."""
    optimizer: str = "torch"
    """Who makes AdamW: ``torch``, or NVIDIA's ``apex`` where that is installed."""

    attention: AttentionOptions = field(default_factory=AttentionOptions)
    """Which attention runs; its FP8 is ours, apart from Transformer Engine's linear layers."""

    def __post_init__(self) -> None:
        for name, legal in LEGAL.items():
            check_one_of(f"engine.{name}", getattr(self, name), legal)

    @property
    def torch_dtype(self) -> torch.dtype:
        """``dtype`` as torch names it."""
        return torch.bfloat16 if self.dtype == "bfloat16" else torch.float32
