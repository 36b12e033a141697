"""Choice of the attention kernel: PyTorch's, or ours in FP8, by device and sequence length."""

import contextlib
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gptface_dist.errors import UserError, check_one_of
from gptface_dist.kernels.attention.norm import QkNorm
from gptface_dist.kernels.attention.operator import fp8_attention
from gptface_dist.kernels.attention.options import HEAD_SIZES, Fp8Options, Sequences

KERNELS = ("auto", "sdpa", "fp8")

HOPPER = (9, 0)
"""Compute capability of the GPUs that the FP8 kernels are compiled and checked for."""
HOPPER_BACKENDS = (
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)
"""Backends of PyTorch's attention on a Hopper GPU, in order of preference. PyTorch's own order begins with FlashAttention,
which takes no mask and, as others measured it, is slower there (huggingface/transformers#48163)."""


@dataclass(frozen=True)
class AttentionOptions:
    """Choice of the attention kernel in training; kernels differ in rounding only."""

    kernel: str = "auto"
    """``sdpa``: PyTorch's fused attention in the precision of the activations. ``fp8``: ours, with products in FP8; on a
    CPU the same roundings in plain PyTorch, to study, not to save time. ``auto``: ``fp8`` where it is known to be faster."""
    fp8_from: int | None = None
    """Shortest padded sequence, in tokens, for which ``auto`` takes FP8 on a Hopper GPU, as ``gptface bench attention``
    measures it there; null: never. No crossover has been measured yet, hence the default."""
    fp8: Fp8Options = field(default_factory=Fp8Options)
    """Rounding, scaling and smoothing of the FP8 kernels."""

    def __post_init__(self) -> None:
        check_one_of("engine.attention.kernel", self.kernel, KERNELS)
        if self.fp8_from is not None and self.fp8_from < 1:
            raise UserError(f"engine.attention.fp8_from must be at least 1 or null, got {self.fp8_from}")

    def check(self, head_size: int, dropout: float) -> None:
        """Raise :class:`UserError` if ``kernel`` is ``fp8`` and the FP8 kernels do not support the model."""
        if self.kernel != "fp8":
            return
        if head_size > HEAD_SIZES[-1]:
            raise UserError(f"engine.attention.kernel fp8 has heads of up to {HEAD_SIZES[-1]}, the model of {head_size}")
        if dropout > 0:
            raise UserError(f"engine.attention.kernel fp8 has no dropout: set model.attention_dropout to 0, got {dropout}")

    @property
    def may_be_fp8(self) -> bool:
        """Whether :meth:`in_fp8` can be true for any tensor."""
        return self.kernel == "fp8" or (self.kernel == "auto" and self.fp8_from is not None)

    def in_fp8(self, x: Tensor) -> bool:
        """Whether attention of tensors [B, L, N, D] with the dtype, shape and device of ``x`` runs in FP8."""
        if self.kernel != "auto" or self.fp8_from is None or not x.is_cuda:
            return self.kernel == "fp8"
        fits = x.dtype == torch.bfloat16 and x.shape[-1] in HEAD_SIZES and x.shape[1] >= self.fp8_from
        return fits and torch.cuda.get_device_capability(x.device) == HOPPER


def attend(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, options: AttentionOptions, norm: QkNorm | None = None
) -> Tensor:
    """softmax(Q K^T / sqrt(D)) V of [B, L, N, D] tensors, without dropout; ``norm`` is applied to Q and K first.

    ``attn_mask`` bool [B, 1, 1, L]: true at tokens, which precede the padding of their sequence. None: no padding.
    Returns [B, L, N, D]; values at padded positions differ between the kernels and must not be used.
    """
    if options.in_fp8(q):
        return fp8_attention(q, k, v, Sequences.padded(lengths(q, attn_mask), q.shape[1]), options.fp8, norm)
    if norm is not None:
        q, k = norm(q, k)
    return sdpa(q, k, v, attn_mask)


def lengths(q: Tensor, attn_mask: Tensor | None) -> Tensor:
    """Int [B]: tokens without padding of each sequence of ``q`` [B, L, N, D], by the mask of :func:`attend`."""
    if attn_mask is None:
        return torch.full((q.shape[0],), q.shape[1], dtype=torch.int32, device=q.device)
    return attn_mask.sum(-1).flatten()


def sdpa(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None) -> Tensor:
    """PyTorch's attention of [B, L, N, D] tensors, as training calls it; ``attn_mask`` as in :func:`attend`."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with sdpa_priority(q):
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
    return attended.transpose(1, 2)


def sdpa_priority(q: Tensor) -> contextlib.AbstractContextManager[None]:
    """Context for PyTorch's attention of tensors like ``q``: prefers :data:`HOPPER_BACKENDS` in half precision on Hopper."""
    half = q.dtype in (torch.bfloat16, torch.float16)
    if q.is_cuda and half and torch.cuda.get_device_capability(q.device) == HOPPER:
        return sdpa_kernel(list(HOPPER_BACKENDS), set_priority=True)
    return contextlib.nullcontext()
