"""Sequences with tokens to draw, singly and as padded batches of a fixed size.

The last bits of a product of matrices depend on its shape, and near ties between two tokens depend on those bits. The draw for
one sequence must not depend on the others, so the model always sees batches of one shape for a sequence of a given length:
on the CPU one sequence without padding; on a GPU 16 rows padded to a multiple of 32, copies of the last one in unused rows.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gptface_dist.sequence import IMAGE, PADDING, PaddedBatch, SequenceLayout, empty_rows
from gptface_dist.tokenizers.vocabulary import Vocabulary


@dataclass(frozen=True)
class MaskedSequence:
    """A sequence ``[CLS] text [SEP] image [SEP]`` of L tokens on the CPU, some of which are to be drawn."""

    tokens: Tensor
    """int64 [L]: joint ids; arbitrary ones where :attr:`wanted`."""
    segments: Tensor
    """int64 [L]: TEXT or IMAGE."""
    positions: Tensor
    """int64 [L, 2]."""
    wanted: Tensor
    """bool [L]: true for the tokens to draw, all of one modality."""

    @property
    def image(self) -> Tensor:
        """int64 [image tokens]: joint ids of the image."""
        return self.tokens[self.segments == IMAGE]

    @property
    def text(self) -> Tensor:
        """int64 [text tokens]: ids of the text."""
        return self.tokens[1 : len(self.tokens) - 2 - int((self.segments == IMAGE).sum())]

    def completed(self, ids: Tensor) -> "MaskedSequence":
        """A copy with ``ids``, int64 [number of wanted tokens], as the wanted tokens."""
        tokens = self.tokens.clone()
        tokens[self.wanted] = ids
        return replace(self, tokens=tokens)


def compose(vocabulary: Vocabulary, text: Tensor, codes: Tensor, wanted_text: bool, wanted_codes: Tensor) -> MaskedSequence:
    """Lay out text and image as one sequence.

    Args:
        vocabulary: gives the joint ids.
        text: int64 [m], ids of the text tokenizer; m may be 0.
        codes: int64 [h, w].
        wanted_text: whether the whole text is to be drawn.
        wanted_codes: bool [h, w]: true for the codes to draw.
    """
    layout = SequenceLayout(vocabulary, (codes.shape[0], codes.shape[1]))
    arrays = empty_rows(vocabulary, 1, layout.length(len(text)))
    text_at, image_at = layout.write(arrays, 0, text.numpy(), codes.numpy())
    tokens, segments, positions = (torch.as_tensor(arrays[name][0]) for name in ("tokens", "segments", "positions"))
    wanted = torch.zeros_like(tokens, dtype=torch.bool)
    wanted[text_at] = wanted_text
    wanted[image_at] = wanted_codes.reshape(-1)
    return MaskedSequence(tokens, segments, positions, wanted)


@dataclass(frozen=True)
class Shape:
    """The shape that all batches on a kind of device have in common."""

    rows: int
    """Sequences in a batch."""
    multiple: int
    """Lengths are padded to a multiple of this."""

    def padded(self, sequence: MaskedSequence) -> int:
        """Length of a sequence after padding."""
        return -(-len(sequence.tokens) // self.multiple) * self.multiple


def shape_on(device: torch.device) -> Shape:
    """16 rows and a multiple of 32 tokens on CUDA; one sequence without padding elsewhere."""
    return Shape(16, 32) if device.type == "cuda" else Shape(1, 1)


def stack(sequences: Sequence[MaskedSequence], device: torch.device) -> PaddedBatch[Tensor]:
    """Pad sequences into a batch of the device's shape: at most ``rows`` of them, all of one padded length."""
    shape = shape_on(device)
    size = (shape.rows, shape.padded(sequences[0]))
    tokens, segments = torch.zeros(size, dtype=torch.int64), torch.full(size, PADDING)
    positions, lengths = torch.zeros(*size, 2, dtype=torch.int64), torch.empty(shape.rows, dtype=torch.int64)
    for row in range(shape.rows):
        # Unused rows repeat the last sequence: a row without tokens would have nothing to attend to.
        sequence = sequences[min(row, len(sequences) - 1)]
        lengths[row] = n = len(sequence.tokens)
        tokens[row, :n], segments[row, :n], positions[row, :n] = sequence.tokens, sequence.segments, sequence.positions
    batch: PaddedBatch[Tensor] = PaddedBatch(tokens, segments, positions, lengths, padded=True).tensors(device)
    return batch


def batches(sequences: Sequence[MaskedSequence], device: torch.device) -> Iterator[list[int]]:
    """Indices of the sequences of each batch: sequences of one padded length, in order."""
    shape = shape_on(device)
    groups: dict[int, list[int]] = {}
    for number, sequence in enumerate(sequences):
        groups.setdefault(shape.padded(sequence), []).append(number)
    for group in groups.values():
        for start in range(0, len(group), shape.rows):
            yield group[start : start + shape.rows]
