"""Model FLOPs of a step, and the peak FLOP/s of devices.

A multiply-add is 2 FLOPs. The count includes the matrix products that the model defines, on tokens without padding, and takes a
backward pass for twice the forward pass; it excludes recomputed activations, norms, softmaxes and the optimizer
(Chowdhery et al. 2022, appendix B, for what MFU leaves out).
"""

from dataclasses import dataclass

from gptface_dist.model.options import ModelOptions

TFLOPS = {
    "NVIDIA A100-SXM4-40GB": {"bfloat16": 312.0},
    "NVIDIA A100-SXM4-80GB": {"bfloat16": 312.0},
    "NVIDIA A100 80GB PCIe": {"bfloat16": 312.0},
    "NVIDIA H100 80GB HBM3": {"bfloat16": 989.4, "float8": 1978.9},
    "NVIDIA H100 PCIe": {"bfloat16": 756.4, "float8": 1512.9},
    "NVIDIA H200": {"bfloat16": 989.4, "float8": 1978.9},
    "NVIDIA B200": {"bfloat16": 2250.0, "float8": 4500.0},
}
"""Dense peaks in TFLOP/s from NVIDIA's data sheets, by the name that CUDA gives the device."""


@dataclass(frozen=True)
class Work:
    """Size of a step's computation; sizes of several micro-batches and ranks add up."""

    tokens: int
    """Tokens, without padding."""
    pairs: int
    """Sum over sequences of their length squared: the query-key pairs of attention."""
    counts: tuple[int, ...]
    """Items of each of the objective's terms."""


def transformer_flops(options: ModelOptions, work: Work) -> int:
    """FLOPs of the layers' forward pass, without the heads (``Objective.head_flops``).

    Per token and layer ``8 H^2`` (queries, keys, values, projection) and ``4 H F`` (``6 H F`` with swiglu); per pair of
    tokens and layer ``4 H`` (scores, weighted values).
    """
    hidden = options.hidden
    products = 3 if options.activation == "swiglu" else 2
    return options.layers * (work.tokens * (8 * hidden**2 + 2 * products * hidden * options.ffn) + work.pairs * 4 * hidden)


def peak_tflops(device: str, dtype: str) -> float | None:
    """Dense peak of a device by CUDA's name for it and the precision of its matrix products; None if unknown."""
    return TFLOPS.get(device, {}).get(dtype)
