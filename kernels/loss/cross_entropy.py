"""Linear layer and cross-entropy in one, a chunk of rows at a time: the full logits tensor is never materialised.

The gradient of a sum of cross-entropies follows from a chunk's logits, so the forward pass computes it and the backward pass
only scales it: no logits are kept or recomputed (as in Hsu et al., arXiv 2410.10989). Plain PyTorch: nearly all of the time
goes into the matrix products.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 1024
"""Number of rows whose logits are in memory at a time."""


def linear_cross_entropy(
    features: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, group: dist.ProcessGroup | None, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Cross-entropy of ``linear(features, weight, bias)``, whose columns may be spread over the ranks of a group.

    Args:
        features: [M, H] of the rows to predict, alike on every rank; M may be 0.
        weight: [K, H], this rank's columns; K may be 0 and may differ between ranks.
        bias: [K].
        targets: int64 [M]: columns, outside [0, K) where another rank has them.
        group: the ranks that share the columns; None where one has them all.
        chunk: rows at a time, alike on every rank.

    Returns float32 the summed loss in nats, and int64 how many targets have the largest logit. Gradients flow to
    features (this rank's part: the caller sums them over the group), weight and bias.
    """
    gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (features, weight, bias))
    loss, correct = _LinearCrossEntropy.apply(features, weight, bias, targets, group, chunk, gradient)
    return loss, correct


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, features: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, group: dist.ProcessGroup | None, chunk: int,
        gradient: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        loss = torch.zeros((), device=features.device)
        correct = torch.zeros((), dtype=torch.int64, device=features.device)
        if gradient:
            d_features = torch.empty_like(features)
            # Sums over chunks in float32, whatever the weights' precision.
            d_weight, d_bias = (torch.zeros_like(x, dtype=torch.float32) for x in (weight, bias))
        # Column 0 replaces targets of other ranks. Indexing only the local rows would be less work, but the host would have
        # to synchronise with the GPU for their number.
        columns = len(weight)
        local = ((targets >= 0) & (targets < columns)).unsqueeze(1)
        places = torch.where(local, targets.unsqueeze(1), 0)
        for start in range(0, len(features), chunk):
            rows = slice(start, start + chunk)
            logits = F.linear(features[rows], weight, bias).float()
            largest = logits.amax(1) if columns else logits.new_full((len(logits),), -torch.inf)
            if group is not None:
                dist.all_reduce(largest, dist.ReduceOp.MAX, group)
            logits -= largest.unsqueeze(1)
            own = torch.zeros_like(largest)
            if columns:
                own = torch.where(local[rows], logits.gather(1, places[rows]), 0.0).squeeze(1)
            sums = torch.stack([own, logits.exp_().sum(1)])
            if group is not None:
                dist.all_reduce(sums, dist.ReduceOp.SUM, group)
            target, total = sums
            loss += (total.log() - target).sum()
            correct += (target == 0).sum()
            if gradient:
                logits /= total.unsqueeze(1)
                if columns:
                    logits.scatter_add_(1, places[rows], -local[rows].float())
                d_logits = logits.to(features.dtype)
                d_features[rows] = d_logits @ weight
                d_weight += d_logits.mT @ features[rows]
                d_bias += logits.sum(0)
        if gradient:
            ctx.save_for_backward(d_features, d_weight, d_bias)
            ctx.dtypes = weight.dtype, bias.dtype
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        d_features, d_weight, d_bias = ctx.saved_tensors
        weight, bias = ctx.dtypes
        scaled = (d_features * d_loss.to(d_features.dtype), (d_weight * d_loss).to(weight), (d_bias * d_loss).to(bias))
        return *scaled, None, None, None, None
