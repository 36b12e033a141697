"""GPTFace in plain PyTorch, to be read in one sitting: releases hold it, and the parity check compares layouts with it.

A reconstruction of the model of Li et al. (arXiv 2510.18345), whose sizes and hyper-parameters are not public. One
bidirectional pre-norm transformer reads ``[CLS] text [SEP] image [SEP]``. It predicts masked tokens over the ids of their own
modality, and from [CLS] whether image and text belong together.

Letters of shapes: B sequences, L tokens (padded), H hidden width, N heads, D head size, F feed-forward width, V ids,
M masked tokens.
"""

import math
from collections.abc import Mapping
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptface_dist.model.dropout import ATTENTION, EMBEDDINGS, FEED_FORWARD, Masks, attend
from gptface_dist.model.options import ModelOptions
from gptface_dist.model.precision import at_least_float32
from gptface_dist.sequence import IMAGE, SEGMENTS
from gptface_dist.tokenizers.vocabulary import Vocabulary


class Embeddings(nn.Module):
    """Sum of word, segment and position embeddings; the position is an index in the text, or row and column in the image."""

    def __init__(self, vocabulary_size: int, options: ModelOptions):
        super().__init__()
        self.word = nn.Embedding(vocabulary_size, options.hidden)
        self.segment = nn.Embedding(SEGMENTS, options.hidden)
        self.text_position = nn.Embedding(options.text_positions, options.hidden)
        self.row = nn.Embedding(options.rows, options.hidden)
        self.column = nn.Embedding(options.columns, options.hidden)

    def forward(self, tokens: Tensor, segments: Tensor, positions: Tensor) -> Tensor:
        """Int64 [B, L], [B, L], [B, L, 2] -> [B, L, H]."""
        image = (segments == IMAGE).unsqueeze(-1)
        first, second = positions.unbind(-1)
        # Each table looks up index 0 for the other kind of token; `where` then drops the value and its gradient.
        zero = torch.zeros_like(first)
        text_position = self.text_position(torch.where(image[..., 0], zero, first))
        row, column = (table(torch.where(image[..., 0], p, zero)) for table, p in ((self.row, first), (self.column, second)))
        return self.word(tokens) + self.segment(segments) + torch.where(image, row + column, text_position)


class Layer(nn.Module):
    """Transformer layer: pre-norm attention and feed-forward network, each added to the residual stream."""

    def __init__(self, options: ModelOptions):
        super().__init__()
        self.options = options
        hidden, eps = options.hidden, options.norm_eps
        self.attention_norm = nn.LayerNorm(hidden, eps)
        # Rows are grouped by head, (q, k, v) within each: a tensor-parallel shard of heads is a range of rows.
        self.qkv = nn.Linear(hidden, 3 * hidden)
        if options.qk_norm:
            self.q_norm = nn.LayerNorm(options.head_size, eps)
            self.k_norm = nn.LayerNorm(options.head_size, eps)
        self.out_proj = nn.Linear(hidden, hidden)
        self.mlp_norm = nn.LayerNorm(hidden, eps)
        # swiglu: the first half of the rows is the gate, the second the gated value.
        self.mlp_in = nn.Linear(hidden, options.ffn * (2 if options.activation == "swiglu" else 1))
        self.mlp_out = nn.Linear(options.ffn, hidden)

    def forward(self, x_BLH: Tensor, attn_mask: Tensor, masks: Masks | None = None) -> Tensor:
        """[B, L, H] -> [B, L, H]; ``attn_mask`` bool [B, 1, 1, L]: false at padding."""
        attended = self.out_proj(self._attend(self.attention_norm(x_BLH), attn_mask, masks))
        x_BLH = x_BLH + self._dropout(attended, ATTENTION, masks)
        added = self.mlp_out(self._activate(self.mlp_in(self.mlp_norm(x_BLH))))
        return x_BLH + self._dropout(added, FEED_FORWARD, masks)

    def _attend(self, x_BLH: Tensor, attn_mask: Tensor, masks: Masks | None = None) -> Tensor:
        batch, length, hidden = x_BLH.shape
        grouped = self.qkv(x_BLH).view(batch, length, self.options.heads, 3, self.options.head_size)
        q, k, v = (part.transpose(1, 2) for part in grouped.unbind(3))  # [B, N, L, D]
        if self.options.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        dropout = self.options.attention_dropout if self.training else 0.0
        if dropout > 0 and masks is not None:
            attended = attend(q, k, v, attn_mask, dropout, masks)
        else:
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=dropout)
        return attended.transpose(1, 2).reshape(batch, length, hidden)

    def _activate(self, x: Tensor) -> Tensor:
        if self.options.activation == "gelu":
            return F.gelu(x)
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up

    def _dropout(self, x_BLH: Tensor, site: int, masks: Masks | None) -> Tensor:
        return hidden_dropout(x_BLH, self.options.hidden_dropout if self.training else 0.0, site, masks)


class TokenHead(nn.Module):
    """Features of masked tokens -> logits over the ids of their modality, with the word embeddings as output weights."""

    def __init__(self, vocabulary_size: int, options: ModelOptions):
        super().__init__()
        self.dense = nn.Linear(options.hidden, options.hidden)
        self.norm = nn.LayerNorm(options.hidden, options.norm_eps)
        self.bias = nn.Parameter(torch.zeros(vocabulary_size))

    def forward(self, x_MH: Tensor, words_VH: Tensor, ids: range) -> Tensor:
        """[M, H] -> [M, len(ids)]."""
        features = self.norm(F.gelu(self.dense(x_MH)))
        return F.linear(features, words_VH[ids.start : ids.stop], self.bias[ids.start : ids.stop])


class ITMHead(nn.Module):
    """[CLS] -> logits of (negative, matched)."""

    def __init__(self, options: ModelOptions):
        super().__init__()
        self.pooler = nn.Linear(options.hidden, options.hidden)
        self.output = nn.Linear(options.hidden, 2)

    def forward(self, cls_BH: Tensor) -> Tensor:
        """[B, H] -> [B, 2]."""
        return self.output(torch.tanh(self.pooler(cls_BH)))


class Transformer(nn.Module):
    """Embeddings, layers and final norm, with the heads of an objective.

    Args:
        options: size and form.
        vocabulary: joint ids of text and image.
        heads: modules on top of the features, by attribute name.
        token_head: whether to add a :class:`TokenHead` tied to the word embeddings.
        inputs: further modules of ``embeddings``, by attribute name.
    """

    def __init__(
        self,
        options: ModelOptions,
        vocabulary: Vocabulary,
        heads: Mapping[str, nn.Module],
        token_head: bool,
        inputs: Mapping[str, nn.Module] = MappingProxyType({}),
    ):
        super().__init__()
        self.options, self.vocabulary = options, vocabulary
        self.embeddings = Embeddings(vocabulary.size, options)
        for name, module in inputs.items():
            self.embeddings.add_module(name, module)
        self.layers = nn.ModuleList(Layer(options) for _ in range(options.layers))
        self.final_norm = nn.LayerNorm(options.hidden, options.norm_eps)
        if token_head:
            self.token_head = TokenHead(vocabulary.size, options)
        for name, module in heads.items():
            self.add_module(name, module)

    def forward(
        self, tokens: Tensor, segments: Tensor, positions: Tensor, lengths: Tensor, masks: Masks | None = None
    ) -> Tensor:
        """Int64 [B, L], [B, L], [B, L, 2], [B] -> features [B, L, H]. Tokens from ``lengths`` on are padding.

        In training, dropout follows ``masks``, or torch's random generator without them.
        """
        return self.encode(self.embeddings(tokens, segments, positions), lengths, masks)

    def encode(self, x_BLH: Tensor, lengths: Tensor, masks: Masks | None = None) -> Tensor:
        """Embeddings [B, L, H], int64 [B] -> features [B, L, H]: :meth:`forward` without the lookup."""
        attn_mask = torch.arange(x_BLH.shape[1], device=x_BLH.device) < lengths.unsqueeze(1)
        dropout = self.options.hidden_dropout if self.training else 0.0
        x_BLH = hidden_dropout(x_BLH, dropout, EMBEDDINGS, masks)
        for number, layer in enumerate(self.layers):
            x_BLH = layer(x_BLH, attn_mask[:, None, None, :], None if masks is None else masks.of_layer(number))
        return self.final_norm(x_BLH)

    def token_logits(self, x_MH: Tensor, ids: range) -> Tensor:
        """Features [M, H] of tokens of one modality -> logits [M, len(ids)] over ``ids`` of the joint vocabulary."""
        return self.token_head(x_MH, self.embeddings.word.weight, ids)

    def token_loss(self, x_MH: Tensor, labels: Tensor, ids: range) -> tuple[Tensor, Tensor]:
        """Features [M, H], int64 [M] within ``ids`` -> float32 summed cross-entropy in nats, int64 right predictions."""
        return summed_cross_entropy(self.token_logits(x_MH, ids), labels - ids.start)


class GPTFace(Transformer):
    """The model of the paper: a transformer with heads for masked tokens and for image-text matching (ITM)."""

    def __init__(self, options: ModelOptions, vocabulary: Vocabulary):
        super().__init__(options, vocabulary, self.heads(options), token_head=True)

    @staticmethod
    def heads(options: ModelOptions) -> dict[str, nn.Module]:
        """Heads beside the token head, by attribute name."""
        return {"itm_head": ITMHead(options)}

    def itm_logits(self, x_BLH: Tensor) -> Tensor:
        """Features [B, L, H] -> logits [B, 2] of (negative, matched)."""
        logits: Tensor = self.get_submodule("itm_head")(x_BLH[:, 0])
        return logits


def hidden_dropout(x_BLH: Tensor, chance: float, site: int, masks: Masks | None) -> Tensor:
    """Dropout of hidden states [B, L, H] by ``masks``, or by torch's random generator without them."""
    return F.dropout(x_BLH, chance) if masks is None else masks.hidden(x_BLH, chance, site, sequence_axis=0)


def summed_cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """[M, K] and int64 [M] -> float32 summed cross-entropy in nats, int64 right predictions. M may be 0."""
    return F.cross_entropy(at_least_float32(logits), targets, reduction="sum"), (logits.argmax(-1) == targets).sum()


def initial_std(name: str, options: ModelOptions) -> float | None:
    """Standard deviation of the parameter's initial normal values; None for norms' weights (1) and all biases (0)."""
    if name.endswith("bias") or "norm" in name:
        return None
    if name.endswith(("out_proj.weight", "mlp_out.weight")):
        return options.init_std / math.sqrt(2 * options.layers)
    return options.init_std
