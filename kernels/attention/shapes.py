"""The batches that attention is timed on."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gptface_dist.kernels.attention.options import Sequences

FULL, PADDED, PACKED = "full", "padded", "packed"
KINDS = (FULL, PADDED, PACKED)

TOKENS = (333, 1024, 2048, 4096, 8192, 16384)
SIZES = (64, 128)


@dataclass(frozen=True)
class Shape:
    """What is attended to: about 16,384 tokens and 2,048 channels at the usual sizes."""

    tokens: int
    """N of the longest sequence."""
    size: int
    """D of each head."""
    batch: int
    """Sequences."""
    heads: int
    """Heads."""
    kind: str = FULL
    """``full``: all sequences have N tokens. ``padded``: from N / 2 to N, each in a row of N. ``packed``: the same lengths,
    one behind the other."""

    def __str__(self) -> str:
        words = {FULL: "", PADDED: ", padded", PACKED: ", packed"}[self.kind]
        return f"{self.batch} x {self.tokens} tokens{words}, {self.heads} heads of {self.size}"

    @classmethod
    def usual(cls, tokens: int, size: int, kind: str = FULL) -> "Shape":
        """The shape that fills a GPU; with lengths that differ, of at least 4 sequences."""
        return cls(tokens, size, max(1 if kind == FULL else 4, 16384 // tokens), 2048 // size, kind)

    def lengths(self) -> list[int]:
        """Tokens of each sequence."""
        if self.kind == FULL or self.batch == 1:
            return [self.tokens] * self.batch
        half = self.tokens / 2
        return [math.ceil(half + half * (number + 1) / self.batch) for number in range(self.batch)]

    def sequences(self, device: torch.device) -> Sequences:
        """Where they lie."""
        lengths = torch.tensor(self.lengths(), dtype=torch.int32, device=device)
        if self.kind != PACKED:
            return Sequences.padded(lengths, self.tokens)
        return Sequences.packed(torch.nn.functional.pad(lengths.cumsum(0), (1, 0)), self.tokens)

    def inputs(self, device: torch.device) -> tuple[Tensor, ...]:
        """Normal q, k, v and the output's gradient in bf16, [B, N, H, D] or packed [T, H, D]; no gradient in padding."""
        generator = torch.Generator(device).manual_seed(0)
        rows = (sum(self.lengths()),) if self.kind == PACKED else (self.batch, self.tokens)
        form = (*rows, self.heads, self.size)
        *qkv, dout = (torch.randn(form, generator=generator, device=device, dtype=torch.bfloat16) for _ in range(4))
        return *qkv, torch.where(self.sequences(device).seen(rows[0]), dout, 0)

    def teraflops(self, milliseconds: float, products: int) -> float:
        """TFLOP/s of ``products`` products of N^2 D a head (2 forward, 5 backward), over tokens that are no padding."""
        return 2 * products * sum(n**2 for n in self.lengths()) * self.size * self.heads / milliseconds / 1e9
