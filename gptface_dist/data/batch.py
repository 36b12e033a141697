"""From a block of token samples to arrays for the model: captions chosen, images swapped, tokens masked, padded.

A sequence is ``[CLS] text [SEP] image [SEP]``. All random choices of a sample come from one generator keyed by
(seed, epoch, key), so they are the same whatever the rank, worker or batch they are made in.
"""

import math
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch

from gptface_dist.data import masking
from gptface_dist.data.masking import MaskingOptions
from gptface_dist.data.order import random
from gptface_dist.data.stream import Block, Delivered, Origin
from gptface_dist.data.tokens import TokenSample
from gptface_dist.errors import UserError
from gptface_dist.tokenizers.vocabulary import Vocabulary

IGNORE = -100
"""Label of a token that is not to be predicted; what ``torch.nn.functional.cross_entropy`` ignores."""
PADDING, TEXT, IMAGE = 0, 1, 2
"""Segments. [CLS] and both [SEP] belong to the text."""
SPECIALS_PER_SEQUENCE = 3

Array = TypeVar("Array", np.ndarray, torch.Tensor)


@dataclass(frozen=True)
class BatchOptions:
    """The shape of sequences and the law of pairs."""

    text_length: int = 64
    """Longest caption in tokens; a longer one is cut."""
    buckets: int = 4
    """Number of lengths that batches are padded to, spread evenly from a short caption to ``text_length``."""
    multiple_of: int = 16
    """Every padded length is a multiple of this: of the tensor-parallel size under sequence parallelism, and of what
    kernels like."""
    swap_share: float = 0.5
    """Probability that a sample's image is another sample's (image-text matching)."""

    def __post_init__(self) -> None:
        if self.text_length < 1 or self.buckets < 1 or self.multiple_of < 1:
            found = (self.text_length, self.buckets, self.multiple_of)
            raise UserError(f"text_length, buckets and multiple_of must be at least 1, got {found}")
        if not 0 <= self.swap_share < 1:
            raise UserError(f"swap_share must be at least 0 and below 1, got {self.swap_share}")

    def lengths(self, image_tokens: int) -> list[int]:
        """The padded lengths, ascending; the last one holds every sequence."""
        found = set()
        for bucket in range(1, self.buckets + 1):
            length = SPECIALS_PER_SEQUENCE + image_tokens + math.ceil(self.text_length * bucket / self.buckets)
            found.add(math.ceil(length / self.multiple_of) * self.multiple_of)
        return sorted(found)


@dataclass(frozen=True)
class Batch(Generic[Array]):
    """B sequences padded to L tokens; as numpy arrays in workers, as torch tensors (``tensors``) in training."""

    tokens: Array
    """int64 [B, L]: ids of the joint vocabulary, masked tokens replaced; [PAD] at the end."""
    labels: Array
    """int64 [B, L]: the id to predict, :data:`IGNORE` where none is. Swapped pairs have none."""
    segments: Array
    """int64 [B, L]: :data:`PADDING`, :data:`TEXT` or :data:`IMAGE`."""
    positions: Array
    """int64 [B, L, 2]: (place in the text, 0) for text and specials, (row, column) for image tokens, (0, 0) for padding."""
    lengths: Array
    """int64 [B]: tokens of each sequence before padding."""
    matched: Array
    """int64 [B]: 1 where image and text belong together, 0 where the image was swapped."""
    text_origins: list[Origin]
    """Where each text comes from."""
    image_origins: list[Origin]
    """Where each image comes from."""

    def tensors(self, device: torch.device | str = "cpu") -> "Batch[torch.Tensor]":
        """The same batch as tensors on a device."""

        def move(array: Array) -> torch.Tensor:
            return torch.as_tensor(array).to(device, non_blocking=True)

        return Batch(
            tokens=move(self.tokens),
            labels=move(self.labels),
            segments=move(self.segments),
            positions=move(self.positions),
            lengths=move(self.lengths),
            matched=move(self.matched),
            text_origins=self.text_origins,
            image_origins=self.image_origins,
        )


@dataclass(frozen=True)
class _Sequence:
    """One sequence before padding."""

    tokens: np.ndarray
    labels: np.ndarray
    segments: np.ndarray
    positions: np.ndarray
    matched: bool
    text_origin: Origin
    image_origin: Origin


class BatchBuilder:
    """Builds batches of blocks; a function of (options, seed, blocks) and nothing else.

    Args:
        vocabulary: the joint ids.
        grid: rows and columns of image codes.
        seed: the run's seed.
        masking_options: what is to be predicted.
        options: lengths and pairs.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        grid: tuple[int, int],
        seed: int,
        masking_options: MaskingOptions,
        options: BatchOptions,
    ):
        self._vocabulary, self._grid, self._seed = vocabulary, grid, seed
        self._masking, self._options = masking_options, options
        self.lengths = options.lengths(grid[0] * grid[1])
        """The lengths that batches are padded to."""

    def __call__(self, blocks: list[Block[TokenSample]]) -> Batch[np.ndarray]:
        """One batch of all samples of the blocks, padded to the shortest of ``lengths`` that holds them."""
        return self._pad([sequence for block in blocks for sequence in self._sequences(block.samples)])

    def _sequences(self, samples: list[Delivered[TokenSample]]) -> list[_Sequence]:
        generators = [random("sample", self._seed, sample.origin.epoch, sample.origin.key) for sample in samples]
        captions = []
        for sample, rng in zip(samples, generators, strict=True):
            chosen = int(rng.integers(len(sample.value.captions)))
            captions.append(sample.value.caption(chosen)[: self._options.text_length])
        masks = [
            (masking.mask_text(len(caption), self._masking, rng), masking.mask_image(*self._grid, self._masking, rng))
            for caption, rng in zip(captions, generators, strict=True)
        ]
        # The draws that depend on the rest of the block come last.
        images = [self._partner(i, captions[i], samples, rng) for i, rng in enumerate(generators)]
        return [
            self._sequence(captions[i], samples[i].origin, samples[images[i]], images[i] == i, *masks[i], generators[i])
            for i in range(len(samples))
        ]

    def _partner(self, own: int, caption: np.ndarray, samples: list[Delivered[TokenSample]], rng: np.random.Generator) -> int:
        """Whose image sample ``own`` gets: its own, or one that its caption is not known to describe."""
        swap, which = rng.random(2)
        if swap >= self._options.swap_share:
            return own
        others = [i for i, other in enumerate(samples) if not self._describes(caption, other.value)]
        return others[int(which * len(others))] if others else own

    def _describes(self, caption: np.ndarray, sample: TokenSample) -> bool:
        """Whether a caption (cut as it is) is one of the sample's."""
        length = self._options.text_length
        table = sample.captions[:, :length]
        padded = np.full(table.shape[1], -1, dtype=table.dtype)
        if len(caption) > len(padded):
            return False
        padded[: len(caption)] = caption
        return bool((table == padded).all(axis=1).any())

    def _sequence(
        self,
        caption: np.ndarray,
        text_origin: Origin,
        image: Delivered[TokenSample],
        matched: bool,
        text_mask: tuple[np.ndarray, np.ndarray],
        image_mask: np.ndarray,
        rng: np.random.Generator,
    ) -> _Sequence:
        ids = self._vocabulary
        codes = image.value.codes
        if codes.shape != self._grid:
            raise UserError(
                f"{image.origin} has {codes.shape[0]}x{codes.shape[1]} codes, the index says {self._grid[0]}x{self._grid[1]}"
            )
        text_at = slice(1, 1 + len(caption))
        image_at = slice(len(caption) + 2, len(caption) + 2 + codes.size)
        length = image_at.stop + 1

        whole = np.full(length, ids.sep_id, dtype=np.int64)
        whole[0] = ids.cls_id
        whole[text_at] = caption
        whole[image_at] = codes.reshape(-1).astype(np.int64) + ids.image_offset

        chosen, action = text_mask
        tokens = whole.copy()
        text = tokens[text_at]
        text[action == masking.MASK] = ids.mask_id
        text[action == masking.RANDOM] = rng.integers(ids.text_size, size=int((action == masking.RANDOM).sum()))
        tokens[image_at][image_mask.reshape(-1)] = ids.mask_id

        labels = np.full(length, IGNORE, dtype=np.int64)
        if matched:
            predicted = np.zeros(length, dtype=bool)
            predicted[text_at], predicted[image_at] = chosen, image_mask.reshape(-1)
            labels[predicted] = whole[predicted]

        segments = np.full(length, TEXT, dtype=np.int64)
        segments[image_at] = IMAGE
        positions = np.zeros((length, 2), dtype=np.int64)
        positions[: image_at.start, 0] = np.arange(image_at.start)
        positions[image_at, 0], positions[image_at, 1] = np.divmod(np.arange(codes.size), codes.shape[1])
        positions[-1, 0] = image_at.start
        return _Sequence(tokens, labels, segments, positions, matched, text_origin, image.origin)

    def _pad(self, sequences: list[_Sequence]) -> Batch[np.ndarray]:
        longest = max(len(sequence.tokens) for sequence in sequences)
        shape = (len(sequences), next(length for length in self.lengths if length >= longest))
        batch = Batch(
            tokens=np.full(shape, self._vocabulary.pad_id, dtype=np.int64),
            labels=np.full(shape, IGNORE, dtype=np.int64),
            segments=np.full(shape, PADDING, dtype=np.int64),
            positions=np.zeros((*shape, 2), dtype=np.int64),
            lengths=np.array([len(sequence.tokens) for sequence in sequences], dtype=np.int64),
            matched=np.array([sequence.matched for sequence in sequences], dtype=np.int64),
            text_origins=[sequence.text_origin for sequence in sequences],
            image_origins=[sequence.image_origin for sequence in sequences],
        )
        for row, sequence in enumerate(sequences):
            length = len(sequence.tokens)
            batch.tokens[row, :length] = sequence.tokens
            batch.labels[row, :length] = sequence.labels
            batch.segments[row, :length] = sequence.segments
            batch.positions[row, :length] = sequence.positions
        return batch
