"""The plain model as pipeline stages: megatron-core's layers between our embeddings and heads.

A stage computes a part of what :class:`gptface_dist.model.plain.GPTFace` computes, with tensor-parallel shards of its
weights. Hidden states travel as [L, B, H] (megatron's order; [L / tp, B, H] under sequence parallelism).
"""

from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region, scatter_to_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from gptface_dist.model.dropout import EMBEDDINGS, Masks
from gptface_dist.model.options import ModelOptions
from gptface_dist.model.plain import MatchHead
from gptface_dist.parallel import specs
from gptface_dist.parallel.layer import LOCAL_NAMES, SharedNorm, StageLayer, layer_spec
from gptface_dist.parallel.layout import Layout
from gptface_dist.parallel.options import EngineOptions
from gptface_dist.parallel.vocab_parallel import TiedGradient, TiedScalar, WordEmbedding, WordLogits, WordRange
from gptface_dist.sequence import IMAGE, SEGMENTS
from gptface_dist.tokenizers.vocabulary import Vocabulary

HEAD_NAMES = {"word_logits.weight": "embeddings.word.weight", "word_logits.bias": "token_head.bias"}
"""Names of a stage's output weights -> names in the plain model, which ties them to its embeddings."""


def global_name(local: str) -> str:
    """A stage's parameter -> its name in the plain model."""
    if not local.startswith("layers."):
        return HEAD_NAMES.get(local, local)
    _, layer, *inner, last = local.split(".")
    return f"layers.{layer}.{LOCAL_NAMES['.'.join(inner)]}.{last}"


class StageEmbeddings(nn.Module):
    """Word + segment + position, as in the plain model."""

    def __init__(self, options: ModelOptions, words: WordRange, dtype: torch.dtype):
        super().__init__()
        self.word = WordEmbedding(words, options.hidden, dtype)
        self.segment = nn.Embedding(SEGMENTS, options.hidden, dtype=dtype)
        self.place = nn.Embedding(options.text_positions, options.hidden, dtype=dtype)
        self.row = nn.Embedding(options.rows, options.hidden, dtype=dtype)
        self.column = nn.Embedding(options.columns, options.hidden, dtype=dtype)

    def forward(self, tokens: Tensor, segments: Tensor, positions: Tensor) -> Tensor:
        """Int64 [B, L], [B, L], [B, L, 2] -> [L, B, H]."""
        image = (segments == IMAGE).unsqueeze(-1)
        first, second = positions.unbind(-1)
        zero = torch.zeros_like(first)
        place = self.place(torch.where(image[..., 0], zero, first))
        row = self.row(torch.where(image[..., 0], first, zero))
        column = self.column(torch.where(image[..., 0], second, zero))
        words = self.word(tokens) + self.segment(segments)
        return (words + torch.where(image, row + column, place)).transpose(0, 1).contiguous()


class TokenFeatures(nn.Module):
    """What the token head does before the logits; every tensor-parallel rank does all of it."""

    def __init__(self, options: ModelOptions, dtype: torch.dtype):
        super().__init__()
        self.dense = nn.Linear(options.hidden, options.hidden, dtype=dtype)
        self.norm = nn.LayerNorm(options.hidden, options.norm_eps, dtype=dtype)

    def forward(self, x_MH: Tensor) -> Tensor:
        """[M, H] -> [M, H]."""
        return self.norm(F.gelu(self.dense(x_MH)))


class Stage(nn.Module):
    """One model chunk.

    Args:
        options: the whole model's.
        vocabulary: the joint ids.
        layout: of the run.
        config: :func:`megatron_config`.
        engine: how steps are computed.
        chunk: which chunk, 0 = first in the model.
    """

    def __init__(
        self,
        options: ModelOptions,
        vocabulary: Vocabulary,
        layout: Layout,
        config: TransformerConfig,
        engine: EngineOptions,
        chunk: int,
    ):
        super().__init__()
        self._config = config
        self.options, self.vocabulary, self.layout = options, vocabulary, layout
        self.first, self.last = chunk == 0, chunk == layout.chunks - 1
        dtype, words = config.params_dtype, WordRange(vocabulary, layout)
        if self.first:
            self.embeddings = StageEmbeddings(options, words, dtype)
        # Layers are built by their global number: this config tells megatron of no pipeline, so it adds no offset.
        alone = replace(config, pipeline_model_parallel_size=1, virtual_pipeline_model_parallel_size=None)
        spec = layer_spec(options, alone, engine)
        self.layers = nn.ModuleDict(
            {str(i): StageLayer(alone, spec.submodules, layer_number=i + 1) for i in layout.layers_of(chunk, options.layers)}
        )
        for layer in self.layers.values():
            cast(StageLayer, layer).set_recompute(engine.recompute)
        if self.last:
            self.final_norm = SharedNorm(config, options.hidden, options.norm_eps, specs.norm(engine.norm))
            self.token_head = TokenFeatures(options, dtype)
            weight = (
                self.embeddings.word.weight
                if self.first
                else nn.Parameter(torch.empty(words.rows, options.hidden, dtype=dtype))
            )
            self.word_logits = WordLogits(words, weight)
            self.match_head = MatchHead(options).to(dtype)
        if self.first or self.last:
            self.tied_scalar = TiedScalar(self.embeddings.word.weight if self.first else self.word_logits.weight)
        self._received: Tensor | None = None

    def tied_gradient(self, device: torch.device) -> TiedGradient | None:
        """Give the word embeddings of this chunk, if it has any, a place for their gradient. Called once."""
        if not (self.first or self.last):
            return None
        tied = TiedGradient(self.tied_scalar.weight.shape, device)
        for module in self.modules():
            if isinstance(module, WordEmbedding | WordLogits | TiedScalar):
                module.tied = tied
        return tied

    def receive(self, hidden: Tensor | None) -> None:
        """Hidden states of the chunk before this one, for the next forward pass."""
        self._received = hidden

    def forward(self, batch: Any, scale: Tensor | None = None, masks: Masks | None = None) -> Any:
        """A micro-batch -> hidden states [L, B, H]; on the last chunk (loss, sums).

        ``scale`` float32 [3] are the factors of the summed losses of text, image and match; ``sums`` float64 [3, 3] are
        rows of (loss, correct, count) for each of them. Without ``scale``, the last chunk gives (0, logits): float32
        [M, ids] of text and image where ``batch.labels`` asks for them, and [B, 2] of the match. Without ``masks``, dropout
        drops nothing.
        """
        if self.first:
            x = self.embeddings(batch.tokens, batch.segments, batch.positions)
            if masks is not None:
                x = masks.hidden(x, self.options.hidden_dropout, EMBEDDINGS, sequence_axis=1)
            x = scatter_to_sequence_parallel_region(x) if self.layout.sp else x
        else:
            assert self._received is not None
            x = self._received
        seen = _seen(batch) if batch.padded else None
        with specs.precision(self._config):
            for layer in self.layers.values():
                x = layer(x, seen, masks)
        if not self.last:
            return x
        return self._logits(x, batch) if scale is None else self._losses(x, batch, scale)

    def _logits(self, x: Tensor, batch: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
        x_BLH = self._features(x)
        found = []
        for ids in (self.vocabulary.text_range, self.vocabulary.image_range):
            chosen = (batch.labels >= ids.start) & (batch.labels < ids.stop)
            found.append(self.word_logits(self.token_head(x_BLH[chosen]), None, ids))
        return torch.zeros((), device=x.device), (*found, self.match_head(x_BLH[:, 0]).float())

    def _features(self, x: Tensor) -> Tensor:
        x = self.final_norm(x)
        x = gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=False) if self.layout.sp else x
        return x.transpose(0, 1)

    def _losses(self, x: Tensor, batch: Any, scale: Tensor) -> tuple[Tensor, Tensor]:
        x_BLH = self._features(x)
        rows = []
        for ids, places in (
            (self.vocabulary.text_range, batch.masked_text),
            (self.vocabulary.image_range, batch.masked_image),
        ):
            # By indices, whose number the host knows, and not by a mask on the device, whose sum it would wait for.
            chosen = places.unbind(1)
            loss, correct = self.word_logits(self.token_head(x_BLH[chosen]), batch.labels[chosen], ids)
            rows.append((loss, correct, loss.new_full((), len(places), dtype=torch.float64)))
        logits = self.match_head(x_BLH[:, 0]).float()
        match = F.cross_entropy(logits, batch.matched, reduction="sum")
        rows.append((match, (logits.argmax(-1) == batch.matched).sum(), match.new_full((), len(logits), dtype=torch.float64)))
        total = sum((loss * scale[i] for i, (loss, _, _) in enumerate(rows)), torch.zeros((), device=x.device))
        sums = torch.stack([torch.stack([part.detach().double() for part in row]) for row in rows])
        return total, sums


def _seen(batch: Any) -> Tensor:
    """Bool [B, 1, 1, L]: which tokens are no padding."""
    places = torch.arange(batch.tokens.shape[1], device=batch.lengths.device)
    return (places < batch.lengths.unsqueeze(1))[:, None, None, :]
