"""What a model computes more exactly than its dtype says."""

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """``x`` in float32; float64, in which the parity check computes what is true, stays."""
    return x if x.dtype == torch.float64 else x.float()
