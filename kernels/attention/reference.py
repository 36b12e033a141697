"""The oracle: softmax attention and its gradients in float64, by their closed forms."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Exact:
    """Float64 [B, N, H, D] each; rows beyond a sequence's length are zero."""

    out: Tensor
    """softmax(Q K^T / sqrt(D)) V."""
    dq: Tensor
    """Gradient with respect to Q."""
    dk: Tensor
    """Gradient with respect to K."""
    dv: Tensor
    """Gradient with respect to V."""


def exact(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, dout: Tensor) -> Exact:
    """Bidirectional attention of [B, N, H, D] tensors, int [B] ``lengths`` and the output's gradient ``dout``.

    With S = Q K^T / sqrt(D), P = softmax(S), O = P V: dV = P^T dO, dP = dO V^T, dS = P (dP - rowsum(dO O)),
    dQ = dS K / sqrt(D), dK = dS^T Q / sqrt(D) (Dao et al., arXiv 2205.14135, appendix B).
    """
    seen = torch.arange(q.shape[1], device=q.device) < lengths.unsqueeze(1)
    # [B, H, N, D]; what padding holds, NaN included, is not looked at.
    q, k, v, dout = (torch.where(seen[:, :, None, None], x, 0).transpose(1, 2).double() for x in (q, k, v, dout))
    factor = 1 / math.sqrt(q.shape[-1])
    scores = (q @ k.mT * factor).masked_fill(~seen[:, None, None, :], -torch.inf)
    # A sequence of no tokens has no row to speak of: its NaN are masked with the other padding.
    p = torch.where(seen[:, None, :, None], scores.softmax(-1), 0)
    out = p @ v
    ds = p * (dout @ v.mT - (dout * out).sum(-1, keepdim=True))
    gradients = (ds @ k * factor, ds.mT @ q * factor, p.mT @ dout)
    return Exact(*(x.transpose(1, 2) for x in (out, *gradients)))
