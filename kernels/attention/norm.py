"""QK-norm as attention applies it: LayerNorm of each query and key over the channels of its head."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class QkNorm:
    """LayerNorm of queries and of keys (Dehghani et al., arXiv 2302.05442), the same for every head."""

    q: Tensor
    """[2, D]: weight and bias of the queries' norm."""
    k: Tensor
    """[2, D]: of the keys'."""
    eps: float
    """Added to the variance."""

    def __call__(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys [.., D], normalised, in their dtype."""
        return self._normalised(q, self.q), self._normalised(k, self.k)

    def _normalised(self, x: Tensor, affine: Tensor) -> Tensor:
        weight, bias = affine.to(x.dtype)
        return F.layer_norm(x, weight.shape, weight, bias, self.eps)

    def affine(self) -> Tensor:
        """Float32 [4, D] for the kernels: weight and bias of the queries', then of the keys'."""
        return torch.cat([self.q, self.k]).float()
