"""Vocabulary-parallel embeddings and logits of a stage, and the gradient of word embeddings tied across stages."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state as groups
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, reduce_from_tensor_model_parallel_region
from torch import Tensor, nn

from gptface_dist.kernels.loss.cross_entropy import linear_cross_entropy
from gptface_dist.parallel.layout import Layout
from gptface_dist.tokenizers.vocabulary import Vocabulary


class VocabRange:
    """Range of ids whose word embeddings this tensor-parallel rank holds: ``rows`` from ``first`` on, padding included."""

    def __init__(self, vocabulary: Vocabulary, layout: Layout):
        self.rows = -(-vocabulary.size // layout.tp)
        self.first = groups.get_tensor_model_parallel_rank() * self.rows
        self.group: dist.ProcessGroup | None = groups.get_tensor_model_parallel_group() if layout.tp > 1 else None
        """Tensor-parallel group that shards the vocabulary; None if it has one rank."""

    def within(self, ids: range) -> slice:
        """Local rows of a range of ids; empty if this rank holds none of them."""
        start = min(max(ids.start - self.first, 0), self.rows)
        return slice(start, min(max(ids.stop - self.first, start), self.rows))


class _Lookup(torch.autograd.Function):
    """Embedding lookup that accumulates the weight's gradient in a separate buffer: see :class:`TiedGradient`."""

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
    """Gradient of the word embeddings, summed over input and output use.

    The first stage embeds with them and the last one predicts with them, at different times. Each stage accumulates its part
    over the step's micro-batches in float32; at the end of the step an all-reduce adds the parts, and one small backward pass
    on both stages (:class:`TiedScalar`) hands the sum to the engine.
    """

    def __init__(self, shape: torch.Size, device: torch.device):
        self.sum = torch.zeros(shape, dtype=torch.float32, device=device)

    def collect(self, weight: Tensor) -> Tensor:
        """The weight as a new leaf whose gradient is added to ``sum``."""
        leaf = weight.detach().requires_grad_()
        leaf.register_post_accumulate_grad_hook(self._add)
        return leaf

    def _add(self, leaf: Tensor) -> None:
        assert leaf.grad is not None
        self.sum += leaf.grad
        leaf.grad = None


class TiedScalar(nn.Module):
    """A scalar whose gradient with respect to the word embeddings is the accumulated one."""

    def __init__(self, weight: nn.Parameter):
        super().__init__()
        self.weight = weight
        self.tied: TiedGradient | None = None

    def forward(self) -> Tensor:
        """Float32 scalar ``(weight * sum).sum()``."""
        assert self.tied is not None
        return (self.weight.float() * self.tied.sum).sum()


class VocabParallelEmbedding(nn.Module):
    """Vocabulary-parallel embedding of tokens."""

    def __init__(self, words: VocabRange, hidden: int, dtype: torch.dtype):
        super().__init__()
        self.words = words
        self.weight = nn.Parameter(torch.empty(words.rows, hidden, dtype=dtype))
        self.tied: TiedGradient | None = None

    def forward(self, tokens: Tensor) -> Tensor:
        """Int64 [B, L] -> [B, L, H], all-reduced over the tensor-parallel group."""
        assert self.tied is not None
        rows = tokens - self.words.first
        local = (rows >= 0) & (rows < self.words.rows)
        anchor = torch.zeros((), dtype=self.weight.dtype, device=tokens.device, requires_grad=True)
        embedded = _Lookup.apply(torch.where(local, rows, 0), self.weight.detach(), anchor, self.tied.sum)
        return reduce_from_tensor_model_parallel_region(embedded * local.unsqueeze(-1))


class VocabParallelHead(nn.Module):
    """Vocabulary-parallel logits and cross-entropy over one modality's ids."""

    def __init__(self, words: VocabRange, weight: nn.Parameter):
        super().__init__()
        self.words = words
        self.weight = weight
        self.bias = nn.Parameter(torch.zeros(words.rows, dtype=weight.dtype))
        self.tied: TiedGradient | None = None

    def forward(self, features_MH: Tensor, labels: Tensor | None, ids: range) -> Any:
        """Features [M, H] and their labels int64 [M] within ``ids`` -> summed cross-entropy (nats) and number of
        correct predictions; the full logits tensor is never materialised.

        Without labels -> the logits, float32 [M, len(ids)], on every tensor-parallel rank.
        """
        local = self.words.within(ids)
        if labels is None:
            logits = features_MH.new_zeros(len(features_MH), len(ids), dtype=torch.float32)
            first = self.words.first + local.start - ids.start
            columns = logits.narrow(1, first, local.stop - local.start) if local.stop > local.start else logits[:, :0]
            columns.copy_(F.linear(features_MH, self.weight[local], self.bias[local]))
            if self.words.group is not None:
                dist.all_reduce(logits, group=self.words.group)
            return logits
        assert self.tied is not None
        weight = self.tied.collect(self.weight)
        features = copy_to_tensor_model_parallel_region(features_MH)
        targets = labels - self.words.first - local.start
        return linear_cross_entropy(features, weight[local], self.bias[local], targets, self.words.group)
