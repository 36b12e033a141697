"""Sequences to be completed, one by one and as padded batches of a fixed size.

The last bits of a product of matrices depend on its shape, and a near tie between two tokens with them. What is drawn for
one sequence must not depend on the others, so the model always sees batches of one shape for a sequence of a given length:
on the CPU one sequence without padding; on a GPU 16 rows, the last ones filled up, padded to a multiple of 32.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gptface_dist.sequence import IMAGE, PADDING, TEXT
from gptface_dist.tokenizers.vocabulary import Vocabulary


@dataclass(frozen=True)
class MaskedSequence:
    """One sequence ``[CLS] text [SEP] image [SEP]`` of L tokens, on the CPU, some of which are to be drawn."""

    tokens: Tensor
    """int64 [L]: joint ids; anything where tokens are to be drawn."""
    segments: Tensor
    """int64 [L]: TEXT or IMAGE."""
    positions: Tensor
    """int64 [L, 2]."""
    wanted: Tensor
    """bool [L]: the tokens to draw, all of one modality."""

    @property
    def image(self) -> Tensor:
        """int64 [image tokens]: joint ids of the image."""
        return self.tokens[self.segments == IMAGE]

    @property
    def text(self) -> Tensor:
        """int64 [text tokens]: ids of the text."""
        return self.tokens[1 : len(self.tokens) - 2 - int((self.segments == IMAGE).sum())]

    def completed(self, ids: Tensor) -> "MaskedSequence":
        """The same sequence with its wanted tokens in place: int64 [wanted]."""
        tokens = self.tokens.clone()
        tokens[self.wanted] = ids
        return replace(self, tokens=tokens)


def compose(vocabulary: Vocabulary, text: Tensor, codes: Tensor, wanted_text: bool, wanted_codes: Tensor) -> MaskedSequence:
    """Lay out a sequence.

    Args:
        vocabulary: the joint ids.
        text: int64 [m] ids of the text; m may be 0.
        codes: int64 [h, w] codes of the image.
        wanted_text: draw the whole text.
        wanted_codes: bool [h, w]: codes to draw.
    """
    rows, columns = codes.shape
    first_sep = 1 + len(text)
    special = torch.tensor([vocabulary.cls_id, vocabulary.sep_id])
    tokens = torch.cat([special[:1], text, special[1:], codes.reshape(-1) + vocabulary.image_offset, special[1:]])
    segments = torch.full_like(tokens, TEXT)
    positions = torch.zeros(len(tokens), 2, dtype=torch.int64)
    positions[: first_sep + 1, 0] = torch.arange(first_sep + 1)
    image = slice(first_sep + 1, first_sep + 1 + rows * columns)
    segments[image] = IMAGE
    positions[image] = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    positions[-1, 0] = first_sep + 1
    wanted = torch.zeros_like(tokens, dtype=torch.bool)
    wanted[1:first_sep] = wanted_text
    wanted[image] = wanted_codes.reshape(-1)
    return MaskedSequence(tokens, segments, positions, wanted)


@dataclass(frozen=True)
class PaddedBatch:
    """B sequences padded to L tokens, on the model's device."""

    tokens: Tensor
    """int64 [B, L]."""
    segments: Tensor
    """int64 [B, L]."""
    positions: Tensor
    """int64 [B, L, 2]."""
    lengths: Tensor
    """int64 [B]."""


@dataclass(frozen=True)
class Shape:
    """The one shape of all batches on a kind of device."""

    rows: int
    """Sequences."""
    multiple: int
    """Their length is padded to a multiple of this."""

    def padded(self, sequence: MaskedSequence) -> int:
        """Tokens that a sequence is padded to."""
        return -(-len(sequence.tokens) // self.multiple) * self.multiple


def shape_on(device: torch.device) -> Shape:
    """The shape of batches on a device."""
    return Shape(16, 32) if device.type == "cuda" else Shape(1, 1)


def stack(sequences: Sequence[MaskedSequence], device: torch.device) -> PaddedBatch:
    """Sequences of one padded length, at most as many as a batch has rows, as a batch of the fixed size."""
    shape = shape_on(device)
    size = (shape.rows, shape.padded(sequences[0]))
    tokens, segments = torch.zeros(size, dtype=torch.int64), torch.full(size, PADDING)
    positions, lengths = torch.zeros(*size, 2, dtype=torch.int64), torch.empty(shape.rows, dtype=torch.int64)
    for row in range(shape.rows):
        # The last one again and again: a row without tokens would have nothing to attend to.
        sequence = sequences[min(row, len(sequences) - 1)]
        lengths[row] = n = len(sequence.tokens)
        tokens[row, :n], segments[row, :n], positions[row, :n] = sequence.tokens, sequence.segments, sequence.positions
    return PaddedBatch(*(part.to(device) for part in (tokens, segments, positions, lengths)))


def batches(sequences: Sequence[MaskedSequence], device: torch.device) -> Iterator[list[int]]:
    """Numbers of the sequences that go into one batch together: those of one padded length, in order."""
    shape = shape_on(device)
    groups: dict[int, list[int]] = {}
    for number, sequence in enumerate(sequences):
        groups.setdefault(shape.padded(sequence), []).append(number)
    for group in groups.values():
        for start in range(0, len(group), shape.rows):
            yield group[start : start + shape.rows]
