"""What an objective is: data, heads and losses of a training run, none of which knows about ranks, stages or shards.

Every loss is a sum over items (tokens, pairs, rows) of a function of that item's features and of constants that are known
before the backward pass; the engine divides it by the number of items in the global batch. So it does not matter which rank
and which micro-batch an item is in. A loss in which items depend on each other, such as a contrastive one, gets its constants
from a *survey*: a forward pass of the whole global batch, whose outputs are gathered over data-parallel ranks in the order of
samples (gradient cache, Gao et al. 2021, arXiv 2101.06983, over a pipeline).

To add an objective, write one file beside this one and name it in :mod:`gptface_dist.objectives.registry`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from gptface_dist.data.options import DataConfig
from gptface_dist.data.stream import Block, RawSample
from gptface_dist.data.tokens import TokenDecoder
from gptface_dist.errors import UserError
from gptface_dist.model.flops import Work, transformer_flops
from gptface_dist.model.options import ModelOptions
from gptface_dist.model.parameters import ParameterSpec, parameters
from gptface_dist.model.plain import Transformer
from gptface_dist.model.reference_batch import ReferenceBatch
from gptface_dist.sequence import PaddedBatch
from gptface_dist.tokenizers.vocabulary import Vocabulary


@dataclass(frozen=True)
class Term:
    """One loss of an objective."""

    name: str
    """Key of its weight (``loss.NAME``), and of its metrics (``loss/NAME``, ``accuracy/NAME``)."""
    items: str
    """What it is a sum over, in words."""


class LossSum(NamedTuple):
    """One loss over the items of a micro-batch."""

    loss: Tensor
    """Float32 scalar in nats, summed; its gradient is what is learned."""
    correct: Tensor
    """Scalar: how many items were predicted right."""
    items: int
    """How many it is a sum over."""


class Heads(Protocol):
    """The output side of a model: the plain model itself, or the last stage of a pipeline."""

    vocabulary: Vocabulary
    """The joint ids."""

    def token_logits(self, x_MH: Tensor, ids: range) -> Tensor:
        """Features [M, H] -> logits [M, len(ids)] over ``ids``."""

    def token_loss(self, x_MH: Tensor, labels: Tensor, ids: range) -> tuple[Tensor, Tensor]:
        """Features [M, H], int64 [M] within ``ids`` -> float32 summed cross-entropy, right predictions."""

    def get_submodule(self, target: str) -> nn.Module:
        """One of :meth:`Objective.heads`."""


@dataclass(frozen=True)
class Objective(ABC):
    """Base of all objectives; a subclass gives what is abstract, and what differs from a model of token sequences."""

    name: ClassVar[str]
    """What configurations call it."""
    terms: ClassVar[tuple[Term, ...]]
    """Its losses, in the order of everything that lists them."""
    predicts_tokens: ClassVar[bool] = True
    """Whether it asks :class:`Heads` for tokens; otherwise the model has no token head."""

    weights: Mapping[str, float] = field(default_factory=dict, hash=False)
    """Factor of each term's mean loss; 1 where none is given."""

    def __post_init__(self) -> None:
        names = [term.name for term in self.terms]
        for name in self.weights:
            if name not in names:
                raise UserError(f"loss.{name} is no term of the objective {self.name}: it has {', '.join(names)}")
        object.__setattr__(self, "weights", {name: float(self.weights.get(name, 1.0)) for name in names})

    # Data: a function of (seed, blocks) alone, so that no layout changes it.

    def decoder(self, vocabulary: Vocabulary) -> Callable[[RawSample], Any]:
        """What makes a sample of a shard's members; picklable."""
        return TokenDecoder(vocabulary)

    @abstractmethod
    def collate(
        self, data: DataConfig, vocabulary: Vocabulary, grid: tuple[int, int]
    ) -> Callable[[list[Block[Any]]], PaddedBatch[np.ndarray]]:
        """What makes a micro-batch of blocks; picklable. ``grid``: rows and columns of image codes."""

    @abstractmethod
    def counts(self, batch: PaddedBatch[Any]) -> list[int]:
        """Items of each term in a micro-batch, known without asking a GPU."""

    def targets(self, batch: PaddedBatch[np.ndarray], vocabulary: Vocabulary) -> np.ndarray:
        """Int64 [K]: how often each class is a target; [0] where there are no classes."""
        return np.zeros(0, dtype=np.int64)

    def constant_guess(self, targets: np.ndarray, vocabulary: Vocabulary) -> dict[str, float]:
        """By term, the least loss (nats) of the same guess for every item, given the sum of :meth:`targets`."""
        return {}

    def describe(self, batch: PaddedBatch[np.ndarray]) -> list[dict[str, object]]:
        """Each row of a micro-batch for a person to read: heading -> value."""
        return [{"tokens": length} for length in batch.lengths.tolist()]

    # Model.

    def heads(self, options: ModelOptions) -> dict[str, nn.Module]:
        """Modules of the last stage beside the token head, by name; every tensor-parallel rank has all of them."""
        return {}

    def inputs(self, options: ModelOptions) -> dict[str, nn.Module]:
        """Modules of the first stage beside the embeddings of tokens, by name, for :meth:`embed`."""
        return {}

    def model(self, options: ModelOptions, vocabulary: Vocabulary) -> Transformer:
        """The plain model, with torch's initial values."""
        return Transformer(options, vocabulary, self.heads(options), self.predicts_tokens, self.inputs(options))

    def embed(self, embeddings: nn.Module, batch: PaddedBatch[Tensor]) -> Tensor:
        """The input [B, L, H] of the first layer; ``embeddings`` has :meth:`inputs` as attributes."""
        x_BLH: Tensor = embeddings(batch.tokens, batch.segments, batch.positions)
        return x_BLH

    def parameters(self, options: ModelOptions, vocabulary: Vocabulary) -> list[ParameterSpec]:
        """The model's table of parameters, without allocating any."""
        with torch.device("meta"):
            return list(parameters(self.model(options, vocabulary)))

    def parameter_count(self, options: ModelOptions, vocabulary: Vocabulary) -> int:
        """Number of trainable values; tied embeddings count once."""
        return sum(torch.Size(parameter.shape).numel() for parameter in self.parameters(options, vocabulary))

    # Losses: the same code on the plain model and on the last stage.

    @abstractmethod
    def losses(self, x_BLH: Tensor, batch: PaddedBatch[Tensor], heads: Heads, constants: Mapping[str, Tensor]) -> list[LossSum]:
        """Each term over a micro-batch's features [B, L, H]; ``constants`` are this micro-batch's, of the survey."""

    # What is checked and reported.

    @abstractmethod
    def reference_outputs(self, x_BLH: Tensor, batch: ReferenceBatch, heads: Heads) -> dict[str, Tensor]:
        """Outputs of all heads on the reference batch, by name: what a release must reproduce."""

    @abstractmethod
    def head_flops(self, options: ModelOptions, vocabulary: Vocabulary, counts: Sequence[int]) -> int:
        """FLOPs of the heads' forward pass on so many items of each term."""

    def flops(self, options: ModelOptions, vocabulary: Vocabulary, work: Work) -> int:
        """Model FLOPs of forward and backward pass."""
        return 3 * (transformer_flops(options, work) + self.head_flops(options, vocabulary, work.counts))


@dataclass(frozen=True)
class CoupledObjective(Objective):
    """An objective whose items depend on each other: its constants come from a survey of the whole global batch."""

    @abstractmethod
    def survey(self, x_BLH: Tensor, batch: PaddedBatch[Tensor], heads: Heads) -> dict[str, Tensor]:
        """What :meth:`constants` needs of a micro-batch: tensors [samples, ..], float32 or int64."""

    @abstractmethod
    def constants(self, surveyed: Mapping[str, Tensor], own: slice) -> dict[str, Tensor]:
        """Tensors [own samples, ..] for :meth:`losses`, from the whole global batch's survey [samples, ..]; a pure function."""

    @abstractmethod
    def coupled_losses(self, surveyed: Mapping[str, Tensor]) -> list[LossSum]:
        """Each term over the whole global batch by its textbook formula, through which autograd differentiates: the oracle."""
