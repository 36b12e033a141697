"""A stage's words: vocabulary-parallel embeddings and logits, and the gradient that ties them across stages."""

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
    """The rows of the word embeddings that this tensor-parallel rank has."""

    def __init__(self, vocabulary: Vocabulary, layout: Layout):
        self.rows = -(-vocabulary.size // layout.tp)
        self.first = groups.get_tensor_model_parallel_rank() * self.rows
        self.group: dist.ProcessGroup | None = groups.get_tensor_model_parallel_group() if layout.tp > 1 else None
        """The ranks that share the words; None where this one has them all."""

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


class VocabParallelEmbedding(nn.Module):
    """Vocabulary-parallel lookup of words."""

    def __init__(self, words: VocabRange, hidden: int, dtype: torch.dtype):
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


class VocabParallelHead(nn.Module):
    """Vocabulary-parallel logits: this rank's part of one modality's ids."""

    def __init__(self, words: VocabRange, weight: nn.Parameter):
        super().__init__()
        self.words = words
        self.weight = weight
        self.bias = nn.Parameter(torch.zeros(words.rows, dtype=weight.dtype))
        self.tied: TiedGradient | None = None

    def forward(self, features_MH: Tensor, labels: Tensor | None, ids: range) -> Any:
        """Features [M, H] and their labels int64 [M] within ``ids`` -> summed cross-entropy and right predictions.

        Without labels -> the logits themselves, float32 [M, len(ids)], on every tensor-parallel rank.
        """
        mine = self.words.within(ids)
        if labels is None:
            logits = features_MH.new_zeros(len(features_MH), len(ids), dtype=torch.float32)
            first = self.words.first + mine.start - ids.start
            columns = logits.narrow(1, first, mine.stop - mine.start) if mine.stop > mine.start else logits[:, :0]
            columns.copy_(F.linear(features_MH, self.weight[mine], self.bias[mine]))
            if self.words.group is not None:
                dist.all_reduce(logits, group=self.words.group)
            return logits
        assert self.tied is not None
        weight = self.tied.collect(self.weight)
        features = copy_to_tensor_model_parallel_region(features_MH)
        targets = labels - self.words.first - mine.start
        return linear_cross_entropy(features, weight[mine], self.bias[mine], targets, self.words.group)
