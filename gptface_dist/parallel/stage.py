"""The plain model as pipeline stages: megatron-core's layers between our embeddings and heads.

A stage computes a part of what :class:`gptface_dist.model.plain.GPTFace` computes, with tensor-parallel shards of its
weights. Hidden states travel as [L, B, H] (megatron's order; [L / tp, B, H] under sequence parallelism).
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region, scatter_to_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from gptface_dist.model.dropout import EMBEDDINGS, Masks
from gptface_dist.model.options import ModelOptions
from gptface_dist.objectives.objective import Heads, Objective
from gptface_dist.parallel import specs
from gptface_dist.parallel.layer import LOCAL_NAMES, ReplicatedNorm, StageLayer, layer_spec
from gptface_dist.parallel.layout import Layout
from gptface_dist.parallel.options import EngineOptions
from gptface_dist.parallel.vocab_parallel import TiedGradient, TiedScalar, VocabParallelEmbedding, VocabParallelHead, VocabRange
from gptface_dist.sequence import IMAGE, SEGMENTS
from gptface_dist.tokenizers.vocabulary import Vocabulary

Finish = Callable[[Tensor, Any, Heads], tuple[Tensor, Any]]
"""Features [B, L, H], micro-batch, heads -> (loss to differentiate, outputs to collect)."""
HEAD_NAMES = {"vocab_head.weight": "embeddings.word.weight", "vocab_head.bias": "token_head.bias"}
"""Names of a stage's output weights -> names in the plain model, where they are tied to the embeddings."""


def global_name(local: str) -> str:
    """Name of a stage's parameter -> its name in the plain model."""
    if not local.startswith("layers."):
        return HEAD_NAMES.get(local, local)
    _, layer, *inner, last = local.split(".")
    return f"layers.{layer}.{LOCAL_NAMES['.'.join(inner)]}.{last}"


class StageEmbeddings(nn.Module):
    """The plain model's embeddings with vocabulary-parallel words."""

    def __init__(self, options: ModelOptions, words: VocabRange, dtype: torch.dtype):
        super().__init__()
        self.word = VocabParallelEmbedding(words, options.hidden, dtype)
        self.segment = nn.Embedding(SEGMENTS, options.hidden, dtype=dtype)
        self.text_position = nn.Embedding(options.text_positions, options.hidden, dtype=dtype)
        self.row = nn.Embedding(options.rows, options.hidden, dtype=dtype)
        self.column = nn.Embedding(options.columns, options.hidden, dtype=dtype)

    def forward(self, tokens: Tensor, segments: Tensor, positions: Tensor) -> Tensor:
        """Int64 [B, L], [B, L], [B, L, 2] -> [B, L, H]."""
        image = (segments == IMAGE).unsqueeze(-1)
        first, second = positions.unbind(-1)
        zero = torch.zeros_like(first)
        text_position = self.text_position(torch.where(image[..., 0], zero, first))
        row = self.row(torch.where(image[..., 0], first, zero))
        column = self.column(torch.where(image[..., 0], second, zero))
        words = self.word(tokens) + self.segment(segments)
        x_BLH: Tensor = words + torch.where(image, row + column, text_position)
        return x_BLH


class TokenFeatures(nn.Module):
    """The token head up to its logits, replicated over tensor-parallel ranks."""

    def __init__(self, options: ModelOptions, dtype: torch.dtype):
        super().__init__()
        self.dense = nn.Linear(options.hidden, options.hidden, dtype=dtype)
        self.norm = nn.LayerNorm(options.hidden, options.norm_eps, dtype=dtype)

    def forward(self, x_MH: Tensor) -> Tensor:
        """[M, H] -> [M, H]."""
        return self.norm(F.gelu(self.dense(x_MH)))


class Stage(nn.Module):
    """One model chunk: its layers, with embeddings on the first chunk and heads on the last.

    Args:
        objective: provides input modules and heads.
        options: of the whole model.
        vocabulary: joint ids of text and image.
        layout: of the run.
        config: from :func:`gptface_dist.parallel.layer.megatron_config`.
        engine: linear layers, norms, attention and recomputation.
        chunk: index of the chunk, 0 = first in the model.
    """

    def __init__(
        self,
        objective: Objective,
        options: ModelOptions,
        vocabulary: Vocabulary,
        layout: Layout,
        config: TransformerConfig,
        engine: EngineOptions,
        chunk: int,
    ):
        super().__init__()
        self._config, self._objective = config, objective
        self.options, self.vocabulary, self.layout = options, vocabulary, layout
        self.first, self.last = chunk == 0, chunk == layout.chunks - 1
        dtype, words = config.params_dtype, VocabRange(vocabulary, layout)
        if self.first:
            self.embeddings = StageEmbeddings(options, words, dtype)
            for name, module in objective.inputs(options).items():
                self.embeddings.add_module(name, module.to(dtype))
        # Layers carry their global number: without a pipeline in its config, megatron adds no offset.
        alone = replace(config, pipeline_model_parallel_size=1, virtual_pipeline_model_parallel_size=None)
        spec = layer_spec(options, alone, engine)
        self.layers = nn.ModuleDict(
            {str(i): StageLayer(alone, spec.submodules, layer_number=i + 1) for i in layout.layers_of(chunk, options.layers)}
        )
        for layer in self.layers.values():
            cast(StageLayer, layer).set_recompute(engine.recompute)
        if self.last:
            self.final_norm = ReplicatedNorm(config, options.hidden, options.norm_eps, specs.norm(engine.norm))
            for name, module in objective.heads(options).items():
                self.add_module(name, module.to(dtype))
        predicts = self.last and objective.predicts_tokens
        if predicts:
            self.token_head = TokenFeatures(options, dtype)
            weight = (
                self.embeddings.word.weight
                if self.first
                else nn.Parameter(torch.empty(words.rows, options.hidden, dtype=dtype))
            )
            self.vocab_head = VocabParallelHead(words, weight)
        self.has_words = self.first or predicts
        """Whether this chunk has the word embeddings, or a tied copy of them."""
        if self.has_words:
            self.tied_scalar = TiedScalar(self.embeddings.word.weight if self.first else self.vocab_head.weight)
        self._received: Tensor | None = None

    def tied_gradient(self, device: torch.device) -> TiedGradient | None:
        """Create the buffer of the word embeddings' gradient; None if this chunk has no word embeddings. Call it once."""
        if not self.has_words:
            return None
        tied = TiedGradient(self.tied_scalar.weight.shape, device)
        for module in self.modules():
            if isinstance(module, VocabParallelEmbedding | VocabParallelHead | TiedScalar):
                module.tied = tied
        return tied

    def receive(self, hidden: Tensor | None) -> None:
        """Set the hidden states of the previous chunk, the input of the next forward pass."""
        self._received = hidden

    def forward(self, batch: Any, finish: Finish, masks: Masks | None = None) -> Any:
        """A micro-batch -> hidden states [L, B, H]; on the last chunk ``finish(features, batch, self)``.

        Without ``masks``, there is no dropout.
        """
        if self.first:
            x = self._objective.embed(self.embeddings, batch).transpose(0, 1).contiguous()
            if masks is not None:
                x = masks.hidden(x, self.options.hidden_dropout, EMBEDDINGS, sequence_axis=1)
            x = scatter_to_sequence_parallel_region(x) if self.layout.sp else x
        else:
            assert self._received is not None
            x = self._received
        attn_mask = _attn_mask(batch) if batch.padded else None
        with specs.precision(self._config):
            for layer in self.layers.values():
                x = layer(x, attn_mask, masks)
        return finish(self._features(x), batch, self) if self.last else x

    def _features(self, x: Tensor) -> Tensor:
        x = self.final_norm(x)
        x = gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=False) if self.layout.sp else x
        return x.transpose(0, 1)

    def token_logits(self, x_MH: Tensor, ids: range) -> Tensor:
        """Features [M, H] -> float32 logits [M, len(ids)], on every tensor-parallel rank."""
        logits: Tensor = self.vocab_head(self.token_head(x_MH), None, ids)
        return logits

    def token_loss(self, x_MH: Tensor, labels: Tensor, ids: range) -> tuple[Tensor, Tensor]:
        """Features [M, H], int64 [M] within ``ids`` -> float32 summed cross-entropy in nats, number of correct predictions."""
        loss, correct = self.vocab_head(self.token_head(x_MH), labels, ids)
        return loss, correct


def _attn_mask(batch: Any) -> Tensor:
    """Bool [B, 1, 1, L]: false at padding."""
    positions = torch.arange(batch.length, device=batch.lengths.device)
    return (positions < batch.lengths.unsqueeze(1))[:, None, None, :]
