"""Options of a model: sizes, activation, dropout, initialisation."""

from dataclasses import dataclass

from gptface_dist.errors import UserError, check_one_of

ACTIVATIONS = ("gelu", "swiglu")


@dataclass(frozen=True)
class ModelOptions:
    """Size and form of a model; its vocabulary comes from the tokenizers."""

    layers: int = 12
    """Transformer layers."""
    hidden: int = 768
    """Width of the residual stream."""
    heads: int = 12
    """Attention heads; ``hidden / heads`` is the head size."""
    ffn: int = 3072
    """Width inside the feed-forward network."""
    activation: str = "gelu"
    """``gelu`` (exact), or ``swiglu``: silu(gate) * up, with 1.5 times the weights for the same ``ffn``."""
    qk_norm: bool = False
    """Normalise queries and keys of each head (LayerNorm over the head size) before attention."""
    text_positions: int = 128
    """Positions for text and specials: longest caption + 3."""
    rows: int = 32
    """Largest number of rows of image codes."""
    columns: int = 32
    """Largest number of columns of image codes."""
    hidden_dropout: float = 0.0
    """Dropout after the embeddings, attention and feed-forward network, in training."""
    attention_dropout: float = 0.0
    """Dropout of attention weights, in training."""
    norm_eps: float = 1e-5
    """Added to the variance in every norm."""
    init_std: float = 0.02
    """Standard deviation of initial weights; output projections into the residual stream get ``init_std / sqrt(2 layers)``."""

    def __post_init__(self) -> None:
        for name in ("layers", "hidden", "heads", "ffn", "text_positions", "rows", "columns"):
            if getattr(self, name) < 1:
                raise UserError(f"model.{name} must be at least 1, got {getattr(self, name)}")
        if self.hidden % self.heads:
            legal = [heads for heads in range(1, self.hidden + 1) if self.hidden % heads == 0]
            nearest = min(legal, key=lambda heads: abs(heads - self.heads))
            raise UserError(
                f"model.hidden {self.hidden} is not a multiple of model.heads {self.heads}: nearest is {nearest} heads"
            )
        check_one_of("model.activation", self.activation, ACTIVATIONS)
        for name in ("hidden_dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"model.{name} must be at least 0 and below 1, got {getattr(self, name)}")

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.hidden // self.heads
