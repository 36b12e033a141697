"""What the FP8 attention recipe can do differently, and where the tokens of a batch lie."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gptface_dist.errors import check_one_of

TILE = 128
"""Tokens a tile: the unit to which the kernels' FP8 copies of a sequence are padded, and the keys of one softmax step."""

HEAD_SIZES = (64, 128)
"""Head sizes that the kernels compute; smaller ones are padded with zeros, which changes nothing but time."""

E4M3_MAX = 448.0
"""Largest value of float8_e4m3fn."""

BACKWARDS = ("fp8", "mixed", "bf16")


@dataclass(frozen=True)
class Fp8Options:
    """The FP8 attention recipe (docs/attention.md)."""

    backward: str = "mixed"
    """Which of the backward pass's matrix products are in FP8: ``fp8`` all; ``mixed`` all but dO V^T, the most delicate
    one; ``bf16`` only Q K^T, which must equal the forward pass's."""
    smooth: bool = True
    """Take the mean over the tokens of K and V away before rounding to FP8: exact, and what keeps the error low where
    channels have a bias."""
    hadamard: bool = False
    """Rotate Q and K by a Hadamard matrix before rounding, which spreads outliers over the channels."""
    warp_specialize: bool = False
    """Let loads and matrix products run in different warps. Compiles for sm_90; not yet compared with the plain kernels
    on a GPU, so not the default."""
    launches: str = ""
    """File with the kernels' tile sizes, warps and stages that ``gptface bench attention --tune`` wrote on a GPU; the package's
    own (``kernels/attention/launches.json``) by default."""

    def __post_init__(self) -> None:
        check_one_of("engine.attention.fp8.backward", self.backward, BACKWARDS)


@dataclass(frozen=True)
class Sequences:
    """The sequences of a batch: padded, tensors [B, N, H, D] of which the first ``lengths[b]`` rows count; or packed,
    tensors [T, H, D] in which sequence b has the rows from ``starts[b]`` on.
    """

    lengths: Tensor
    """Int32 [B]: tokens of each sequence, 0 to ``longest``."""
    starts: Tensor | None
    """Int32 [B]: first row of each sequence in a packed batch; None in a padded one."""
    longest: int
    """An upper bound of ``lengths`` that the host knows: N of a padded batch."""

    @classmethod
    def padded(cls, lengths: Tensor, longest: int) -> "Sequences":
        """Of a batch [B, longest, ...]."""
        return cls(lengths.to(torch.int32), None, longest)

    @classmethod
    def packed(cls, cu_seqlens: Tensor, longest: int) -> "Sequences":
        """Of a batch [T, ...] by its cumulative lengths, int [B + 1], from 0 to at most T. Rows beyond the last are padding."""
        boundaries = cu_seqlens.to(torch.int32)
        return cls(boundaries.diff(), boundaries[:-1].contiguous(), longest)

    def seen(self, tokens: int) -> Tensor:
        """Bool [B, N, 1, 1] or, packed, [``tokens``, 1, 1]: rows that are tokens. The device is not waited for."""
        rows = torch.arange(tokens if self.starts is not None else self.longest, device=self.lengths.device)
        if self.starts is None:
            return (rows < self.lengths.unsqueeze(1))[..., None, None]
        return (rows < self.starts[-1] + self.lengths[-1])[:, None, None]

    def check(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """:class:`ValueError` unless q, k, v have one shape that fits, without looking at values on the device."""
        rank = 4 if self.starts is None else 3
        if q.dim() != rank or q.shape != k.shape or q.shape != v.shape:
            form = "[B, N, H, D]" if self.starts is None else "[T, H, D]"
            raise ValueError(f"q, k, v must have one shape {form}, got {[tuple(x.shape) for x in (q, k, v)]}")
        if self.starts is None and tuple(q.shape[:2]) != (len(self.lengths), self.longest):
            raise ValueError(f"q is {tuple(q.shape)} for {len(self.lengths)} sequences of up to {self.longest} tokens")
        if not 1 <= q.shape[-1] <= HEAD_SIZES[-1]:
            raise ValueError(f"head size {q.shape[-1]} is not in 1..{HEAD_SIZES[-1]}")
