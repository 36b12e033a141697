"""Options of engine and optimizer; importable without DeepSpeed and megatron-core."""

from dataclasses import dataclass, field

import torch

from gptface_dist.errors import check_one_of
from gptface_dist.model.attention import AttentionOptions


@dataclass(frozen=True)
class OptimizerOptions:
    """AdamW and gradient clipping."""

    lr: float = 1e-3
    """Peak learning rate; ``schedule`` scales it step by step."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled weight decay; excludes norms, biases and embeddings."""
    max_grad_norm: float = 1.0
    """Clip the whole gradient to this 2-norm; 0 does not clip."""


LEGAL = {
    "dtype": ("float32", "bfloat16"),
    "recompute": ("none", "attention", "layer"),
    "spec": ("local", "transformer_engine"),
    "fp8": ("none", "e4m3", "hybrid"),
    "fp8_recipe": ("delayed", "tensorwise", "blockwise", "mxfp8"),
    "norm": ("torch", "apex"),
    "optimizer": ("torch", "apex"),
}
"""Legal values of :class:`EngineOptions`."""


@dataclass(frozen=True)
class EngineOptions:
    """How a step is computed: results differ in rounding only."""

    dtype: str = "float32"
    """Of weights and activations: ``float32`` or ``bfloat16``. The optimizer keeps master weights and moments in float32."""

    recompute: str = "none"
    """Activation checkpointing: ``none``; ``attention`` recomputes attention from queries, keys and values; ``layer``
    recomputes whole layers from their inputs."""

    spec: str = "local"
    """Linear layers of megatron-core (``local``), or of ``transformer_engine``, which must be installed."""
    fp8: str = "none"
    """Transformer Engine's FP8 format: ``e4m3``; ``hybrid``, with e5m2 for gradients; ``none``: no FP8."""
    fp8_recipe: str = "delayed"
    """Transformer Engine's scaling recipe: ``delayed``, ``tensorwise``, ``blockwise`` or ``mxfp8``."""
    norm: str = "torch"
    """Norms of ``torch``, or of NVIDIA's ``apex``, which must be installed."""
    optimizer: str = "torch"
    """AdamW of ``torch``, or of NVIDIA's ``apex``, which must be installed."""

    attention: AttentionOptions = field(default_factory=AttentionOptions)
    """Attention kernel; its FP8 is our own and independent of ``fp8`` (linear layers)."""

    def __post_init__(self) -> None:
        for name, legal in LEGAL.items():
            check_one_of(f"engine.{name}", getattr(self, name), legal)

    @property
    def torch_dtype(self) -> torch.dtype:
        """``dtype`` as a torch dtype."""
        return torch.bfloat16 if self.dtype == "bfloat16" else torch.float32
