"""Inputs of attention as models have them, in float32, and how far results are apart."""

from torch import Tensor

from gptface_dist.benchmarks.gpu import inputs

KINDS = inputs.KINDS


def attention_inputs(kind: str, batch: int, tokens: int, heads: int, size: int, seed: int = 1) -> tuple[Tensor, ...]:
    """q, k, v and the output's gradient, values of bfloat16 in float32, [batch, tokens, heads, size]."""
    return tuple(x.float() for x in inputs.attention_inputs(kind, batch, tokens, heads, size, seed))


def relative(found: Tensor, true: Tensor) -> float:
    """Root mean square of the difference as a part of the truth's."""
    return ((found.double() - true.double()).norm() / true.double().norm()).item()
