"""The plain model as pipeline stages: megatron-core's layers between our embeddings and heads.

A stage computes a part of what :class:`gptface_dist.model.plain.GPTFace` computes, with tensor-parallel shards of its
weights. Hidden states travel as [L, B, H] (megatron's order; [L / tp, B, H] under sequence parallelism).
"""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state as groups
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn

from gptface_dist.layout import Layout
from gptface_dist.model.options import ModelOptions
from gptface_dist.model.plain import MatchHead
from gptface_dist.sequence import IMAGE, SEGMENTS
from gptface_dist.tokenizers.vocabulary import Vocabulary


def megatron_config(options: ModelOptions, layout: Layout, dtype: torch.dtype) -> TransformerConfig:
    """What megatron-core is told of the model and layout; everything that needs CUDA or fuses away exactness is off."""
    return TransformerConfig(
        num_layers=options.layers,
        hidden_size=options.hidden,
        num_attention_heads=options.heads,
        ffn_hidden_size=options.ffn,
        layernorm_epsilon=options.norm_eps,
        activation_func=F.silu if options.activation == "swiglu" else F.gelu,
        gated_linear_unit=options.activation == "swiglu",
        qk_layernorm=options.qk_norm,
        hidden_dropout=options.hidden_dropout,
        attention_dropout=options.attention_dropout,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        sequence_parallel=layout.sp,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=True,
        perform_initialization=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        # The stage's output passes through a view (the boundary to the engine), which deallocation would break.
        deallocate_pipeline_outputs=False,
        # gloo has no batched point-to-point calls.
        batch_p2p_comm=torch.cuda.is_available(),
        # Our losses are divided by global counts already.
        calculate_per_token_loss=True,
    )


class SharedNorm(nn.Module):
    """LayerNorm whose weights every tensor-parallel rank has, applied to a part of what they serve: a part of the
    sequence (sequence parallelism), or a part of the heads. Their gradients are summed over the ranks in the backward
    pass, before the engine shards them.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, partial: bool | None = None, **_: Any):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.bias = nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))
        self.eps = eps
        self.partial = config.sequence_parallel if partial is None else partial

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden_size] -> the same."""
        weight, bias = self.weight, self.bias
        if self.partial:
            weight, bias = copy_to_tensor_model_parallel_region(weight), copy_to_tensor_model_parallel_region(bias)
        return F.layer_norm(x, self.weight.shape, weight, bias, self.eps)


class HeadNorm(SharedNorm):
    """Norm of queries or keys: every rank has other heads."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, **_: Any):
        super().__init__(config, hidden_size, eps, partial=True)


class OutputLinear(RowParallelLinear):
    """Row-parallel linear layer whose bias, added to a part of the sequence, gets the whole sequence's gradient."""

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """[L, B, K / tp] -> [L, B, H] ([L / tp, B, H]) and the bias to add."""
        output, bias = super().forward(input_)
        if bias is not None and self.sequence_parallel:
            bias = copy_to_tensor_model_parallel_region(bias)
        return output, bias


class CoreAttention(nn.Module):
    """Bidirectional attention of this rank's heads; padding is not attended to."""

    def __init__(self, config: TransformerConfig, **_: Any):
        super().__init__()
        self.dropout = config.attention_dropout

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, **_: Any) -> Tensor:
        """[L, B, N, D] each, bool [B, 1, 1, L] of tokens that are seen -> [L, B, N * D]."""
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask, dropout_p=dropout)
        return attended.permute(2, 0, 1, 3).flatten(2)


def layer_spec(options: ModelOptions) -> ModuleSpec:
    """The ``local`` layer: megatron-core's own modules with our norms and attention."""
    head_norm = HeadNorm if options.qk_norm else IdentityOp
    attention = SelfAttentionSubmodules(
        linear_qkv=ColumnParallelLinear,
        core_attention=CoreAttention,
        linear_proj=OutputLinear,
        q_layernorm=head_norm,
        k_layernorm=head_norm,
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=SharedNorm,
            self_attention=ModuleSpec(
                module=SelfAttention, params={"attn_mask_type": AttnMaskType.padding}, submodules=attention
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=SharedNorm,
            mlp=ModuleSpec(module=MLP, submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=OutputLinear)),
            mlp_bda=get_bias_dropout_add,
        ),
    )


LOCAL_NAMES = {
    "input_layernorm": "attention_norm",
    "self_attention.linear_qkv": "qkv",
    "self_attention.q_layernorm": "q_norm",
    "self_attention.k_layernorm": "k_norm",
    "self_attention.linear_proj": "projection",
    "pre_mlp_layernorm": "mlp_norm",
    "mlp.linear_fc1": "mlp_in",
    "mlp.linear_fc2": "mlp_out",
}
"""Names inside megatron-core's layer -> names inside the plain one."""


HEAD_NAMES = {"word_logits.weight": "embeddings.word.weight", "word_logits.bias": "token_head.bias"}
"""Names of a stage's output weights -> names in the plain model, which ties them to its embeddings."""


def global_name(local: str) -> str:
    """A stage's parameter -> its name in the plain model."""
    if not local.startswith("layers."):
        return HEAD_NAMES.get(local, local)
    _, layer, *inner, last = local.split(".")
    return f"layers.{layer}.{LOCAL_NAMES['.'.join(inner)]}.{last}"


class WordRange:
    """The rows of the word embeddings that this tensor-parallel rank has."""

    def __init__(self, vocabulary: Vocabulary, layout: Layout):
        self.rows = -(-vocabulary.size // layout.tp)
        self.first = groups.get_tensor_model_parallel_rank() * self.rows

    def within(self, ids: range) -> slice:
        """The local rows of a range of ids; empty where this rank has none of them."""
        start = min(max(ids.start - self.first, 0), self.rows)
        return slice(start, min(max(ids.stop - self.first, start), self.rows))


class _Lookup(torch.autograd.Function):
    """Embedding lookup whose weight gradient goes into a buffer of its own: see :class:`TiedGradient`."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, anchor: Tensor, buffer: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.buffer = buffer
        return F.embedding(rows, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, ...]:
        (rows,), (gradient,) = ctx.saved_tensors, gradients
        ctx.buffer.index_add_(0, rows.flatten(), gradient.flatten(0, 1).to(ctx.buffer.dtype))
        return None, None, None, None


class TiedGradient:
    """The gradient of the word embeddings, gathered from both places that use them.

    The first stage embeds with them and the last one predicts with them, at different times. Each collects its part over
    the step's micro-batches in float32; at the end of the step the parts are added, and the sum enters the engine as the
    gradient of one small backward pass on both stages.
    """

    def __init__(self, shape: torch.Size, device: torch.device):
        self.sum = torch.zeros(shape, dtype=torch.float32, device=device)

    def collect(self, weight: Tensor) -> Tensor:
        """The weight as a leaf whose gradient is added to the sum."""
        leaf = weight.detach().requires_grad_()
        leaf.register_post_accumulate_grad_hook(self._add)
        return leaf

    def _add(self, leaf: Tensor) -> None:
        assert leaf.grad is not None
        self.sum += leaf.grad
        leaf.grad = None


class TiedScalar(nn.Module):
    """A scalar whose gradient with respect to the word embeddings is what was collected."""

    def __init__(self, weight: nn.Parameter):
        super().__init__()
        self.weight = weight
        self.tied: TiedGradient | None = None

    def forward(self) -> Tensor:
        """Float32 scalar."""
        assert self.tied is not None
        return (self.weight.float() * self.tied.sum).sum()


class WordEmbedding(nn.Module):
    """Vocabulary-parallel lookup of words."""

    def __init__(self, words: WordRange, hidden: int, dtype: torch.dtype):
        super().__init__()
        self.words = words
        self.weight = nn.Parameter(torch.empty(words.rows, hidden, dtype=dtype))
        self.tied: TiedGradient | None = None

    def forward(self, tokens: Tensor) -> Tensor:
        """Int64 [B, L] -> [B, L, H], summed over the ranks that share the words."""
        assert self.tied is not None
        local = tokens - self.words.first
        mine = (local >= 0) & (local < self.words.rows)
        anchor = torch.zeros((), dtype=self.weight.dtype, device=tokens.device, requires_grad=True)
        found = _Lookup.apply(torch.where(mine, local, 0), self.weight.detach(), anchor, self.tied.sum)
        return reduce_from_tensor_model_parallel_region(found * mine.unsqueeze(-1))


class WordLogits(nn.Module):
    """Vocabulary-parallel logits: this rank's part of one modality's ids."""

    def __init__(self, words: WordRange, weight: nn.Parameter):
        super().__init__()
        self.words = words
        self.weight = weight
        self.bias = nn.Parameter(torch.zeros(words.rows, dtype=weight.dtype))
        self.tied: TiedGradient | None = None

    def forward(self, features_MH: Tensor, labels: Tensor, ids: range) -> tuple[Tensor, Tensor]:
        """Features [M, H] and their labels int64 [M] within ``ids`` -> summed cross-entropy and right predictions."""
        assert self.tied is not None
        mine = self.words.within(ids)
        weight = self.tied.collect(self.weight)
        features = copy_to_tensor_model_parallel_region(features_MH)
        logits = F.linear(features, weight[mine], self.bias[mine]).float()
        return vocabulary_parallel_loss(logits, labels - self.words.first - mine.start)


def vocabulary_parallel_loss(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy over logits whose columns are spread over tensor-parallel ranks.

    ``logits`` float32 [M, K]: this rank's columns, K may be 0; ``targets`` int64 [M]: columns, outside [0, K) where
    another rank has them. Returns the summed loss and the number of targets with the largest logit.
    """
    floor = logits.new_full((len(logits), 1), -torch.inf)
    largest = torch.cat([logits.detach(), floor], 1).amax(1)
    torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, groups.get_tensor_model_parallel_group())
    shifted = logits - largest.unsqueeze(1)
    mine = (targets >= 0) & (targets < logits.shape[1])
    columns = torch.where(mine, targets, 0).unsqueeze(1)
    # Without columns there is nothing to gather; the sum keeps the graph, and so the backward's collectives, alike.
    found = shifted.gather(1, columns).squeeze(1) if logits.shape[1] else shifted.sum(1)
    target = reduce_from_tensor_model_parallel_region(torch.where(mine, found, 0.0))
    total = reduce_from_tensor_model_parallel_region(shifted.exp().sum(1))
    return (total.log() - target).sum(), (target.detach() == 0).sum()


class StageEmbeddings(nn.Module):
    """Word + segment + position, as in the plain model."""

    def __init__(self, options: ModelOptions, words: WordRange, dtype: torch.dtype):
        super().__init__()
        self.word = WordEmbedding(words, options.hidden, dtype)
        for name, size in (
            ("segment", SEGMENTS),
            ("place", options.text_positions),
            ("row", options.rows),
            ("column", options.columns),
        ):
            self.add_module(name, nn.Embedding(size, options.hidden, dtype=dtype))

    def forward(self, tokens: Tensor, segments: Tensor, positions: Tensor) -> Tensor:
        """Int64 [B, L], [B, L], [B, L, 2] -> [L, B, H]."""
        image = (segments == IMAGE).unsqueeze(-1)
        first, second = positions.unbind(-1)
        zero = torch.zeros_like(first)
        place = self.get_submodule("place")(torch.where(image[..., 0], zero, first))
        row = self.get_submodule("row")(torch.where(image[..., 0], first, zero))
        column = self.get_submodule("column")(torch.where(image[..., 0], second, zero))
        words = self.word(tokens) + self.get_submodule("segment")(segments)
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
        chunk: which chunk, 0 = first in the model.
    """

    def __init__(self, options: ModelOptions, vocabulary: Vocabulary, layout: Layout, config: TransformerConfig, chunk: int):
        super().__init__()
        self.options, self.vocabulary, self.layout = options, vocabulary, layout
        self.first, self.last = chunk == 0, chunk == layout.chunks - 1
        dtype, words = config.params_dtype, WordRange(vocabulary, layout)
        if self.first:
            self.embeddings = StageEmbeddings(options, words, dtype)
        # Layers are built by their global number: this config tells megatron of no pipeline, so it adds no offset.
        alone = replace(config, pipeline_model_parallel_size=1, virtual_pipeline_model_parallel_size=None)
        spec = layer_spec(options)
        self.layers = nn.ModuleDict(
            {
                str(i): TransformerLayer(alone, spec.submodules, layer_number=i + 1)
                for i in layout.layers_of(chunk, options.layers)
            }
        )
        if self.last:
            self.final_norm = SharedNorm(config, options.hidden, options.norm_eps)
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

    def forward(self, batch: Any, scale: Tensor | None = None) -> Any:
        """A micro-batch -> hidden states [L, B, H]; on the last chunk (loss, sums).

        ``scale`` float32 [3] are the factors of the summed losses of text, image and match; ``sums`` float64 [3, 3] are
        rows of (loss, correct, count) for each of them.
        """
        if self.first:
            x = self.embeddings(batch.tokens, batch.segments, batch.positions)
            x = F.dropout(x, self.options.hidden_dropout, self.training)
            x = scatter_to_sequence_parallel_region(x) if self.layout.sp else x
        else:
            assert self._received is not None
            x = self._received
        length = batch.tokens.shape[1]
        seen = (torch.arange(length, device=x.device) < batch.lengths.unsqueeze(1))[:, None, None, :]
        for layer in self.layers.values():
            x, _ = layer(x, attention_mask=seen)
        return self._losses(x, batch, scale) if self.last else x

    def _losses(self, x: Tensor, batch: Any, scale: Tensor | None) -> tuple[Tensor, Tensor]:
        assert scale is not None
        x = self.final_norm(x)
        x = gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=False) if self.layout.sp else x
        x_BLH = x.transpose(0, 1)
        rows = []
        for ids in (self.vocabulary.text_range, self.vocabulary.image_range):
            chosen = (batch.labels >= ids.start) & (batch.labels < ids.stop)
            loss, correct = self.word_logits(self.token_head(x_BLH[chosen]), batch.labels[chosen], ids)
            rows.append((loss, correct, chosen.sum()))
        logits = self.match_head(x_BLH[:, 0]).float()
        match = F.cross_entropy(logits, batch.matched, reduction="sum")
        rows.append((match, (logits.argmax(-1) == batch.matched).sum(), torch.tensor(len(logits), device=x.device)))
        total = sum((loss * scale[i] for i, (loss, _, _) in enumerate(rows)), torch.zeros((), device=x.device))
        sums = torch.stack([torch.stack([part.detach().double() for part in row]) for row in rows])
        return total, sums
