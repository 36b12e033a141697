"""From a block of token samples to arrays for the model: captions chosen, images swapped, tokens masked, padded.

A sequence is ``[CLS] text [SEP] image [SEP]``. All random choices of a sample come from one generator keyed by
(seed, epoch, key), so they are the same whatever the rank, worker or batch they are made in.
"""

import math
from dataclasses import dataclass, field

import numpy as np

from gptface_dist.data import masking
from gptface_dist.data.masking import MaskingOptions
from gptface_dist.data.order import keyed_generator
from gptface_dist.data.stream import Block, DecodedSample, Provenance
from gptface_dist.data.tokens import TokenSample
from gptface_dist.errors import UserError
from gptface_dist.sequence import IGNORE, SPECIALS_PER_SEQUENCE, Array, PaddedBatch, SequenceLayout, empty_rows
from gptface_dist.tokenizers.vocabulary import Vocabulary


@dataclass(frozen=True)
class BatchOptions:
    """Lengths of sequences and distribution of image-text pairs."""

    text_length: int = 64
    """Longest caption in tokens; a longer one is cut."""
    buckets: int = 4
    """Number of lengths that batches are padded to, spread evenly from a short caption to ``text_length``."""
    pad_to_multiple_of: int = 16
    """Padded lengths are multiples of this number. Sequence parallelism needs a multiple of the tensor-parallel size."""
    itm_negative_ratio: float = 0.5
    """Probability that the image of a sample with a caption is another sample's (image-text matching)."""
    hard_pair_ratio: float = 0.0
    """Share of blocks that train image-text matching alone, unmasked, on crossed pairs: two captions, each with both
    images. ``order.block`` must then be a multiple of 4."""

    def __post_init__(self) -> None:
        if self.text_length < 1 or self.buckets < 1 or self.pad_to_multiple_of < 1:
            values = (self.text_length, self.buckets, self.pad_to_multiple_of)
            raise UserError(f"text_length, buckets and pad_to_multiple_of must be at least 1, got {values}")
        if not 0 <= self.itm_negative_ratio < 1:
            raise UserError(f"itm_negative_ratio must be at least 0 and below 1, got {self.itm_negative_ratio}")
        if not 0 <= self.hard_pair_ratio <= 1:
            raise UserError(f"hard_pair_ratio must lie between 0 and 1, got {self.hard_pair_ratio}")

    def lengths(self, image_tokens: int) -> list[int]:
        """The padded lengths, ascending; the last one holds every sequence."""
        lengths = set()
        for bucket in range(1, self.buckets + 1):
            length = SPECIALS_PER_SEQUENCE + image_tokens + math.ceil(self.text_length * bucket / self.buckets)
            lengths.add(math.ceil(length / self.pad_to_multiple_of) * self.pad_to_multiple_of)
        return sorted(lengths)


@dataclass(frozen=True)
class MaskedBatch(PaddedBatch[Array]):
    """A padded batch with the labels of masked tokens and of image-text matching (itm)."""

    labels: Array = field(metadata={"pad": IGNORE})
    """int64 [B, L]: the id to predict, :data:`IGNORE` elsewhere. Negative pairs have no labels."""
    itm_label: Array = field()
    """int64 [B]: 1 where image and text belong together, 0 where the image is another sample's."""
    masked_text: Array = field()
    """int64 [M, 2]: (row, column) of each label that is a text id, row by row. Derived from ``labels`` on the CPU: on a GPU
    their number would be known only after a host synchronisation."""
    masked_image: Array = field()
    """int64 [M, 2]: (row, column) of each label that is an image id, row by row."""
    text_origins: list[Provenance] = field(default_factory=list)
    """Source, shard and key of each row's text, [B]."""
    image_origins: list[Provenance] = field(default_factory=list)
    """Source, shard and key of each row's image, [B]."""


@dataclass(frozen=True)
class SampleRandomness:
    """All random choices of one sample."""

    caption: np.ndarray
    """int32 [length]: the chosen caption, cut to ``text_length``; length 0 under text dropout."""
    text_mask: tuple[np.ndarray, np.ndarray]
    """``chosen`` (bool [length]) and ``action`` (int8 [length]), as :func:`masking.mask_text` returns them."""
    image_mask: np.ndarray
    """Bool [H, W]: image tokens to predict; all False for samples that train captioning or itm alone."""
    random_ids: np.ndarray
    """int64 [k]: ids that replace the k text tokens with action :data:`masking.RANDOM`."""
    swap: float
    """Uniform in [0, 1): the sample becomes a negative pair below ``itm_negative_ratio``."""
    partner: float
    """Uniform in [0, 1): chooses the image of a negative pair among the candidates."""


class BatchBuilder:
    """Builds batches of blocks; a function of (options, seed, blocks) and nothing else.

    Args:
        vocabulary: the joint ids.
        grid: rows and columns of image codes.
        seed: the run's seed.
        masking_options: distribution of the masked tokens.
        options: sequence lengths and distribution of pairs.
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
        self._layout = SequenceLayout(vocabulary, grid)
        self.lengths = options.lengths(grid[0] * grid[1])
        """Padded lengths, ascending."""

    def __call__(self, blocks: list[Block[TokenSample]]) -> MaskedBatch[np.ndarray]:
        """One batch of all samples of the blocks, padded to the shortest of ``lengths`` that holds them."""
        texts, images, draws = [], [], []
        for block in blocks:
            rng = keyed_generator("crossed", self._seed, block.number)
            crossed = rng.random() < self._options.hard_pair_ratio
            drawn = [self._draw(sample, whole=crossed) for sample in block.samples]
            pairs = self._crossed(block.samples, drawn, rng) if crossed else self._swapped(block.samples, drawn)
            texts += [block.samples[text] for text, _ in pairs]
            images += [block.samples[image] for _, image in pairs]
            draws += [drawn[text] for text, _ in pairs]
        return self._assemble(texts, images, draws)

    def _draw(self, sample: DecodedSample[TokenSample], whole: bool) -> SampleRandomness:
        """Draw all random choices of a sample in a fixed order; ``whole`` masks nothing."""
        rng = keyed_generator("sample", self._seed, sample.origin.epoch, sample.origin.key)
        which, swap, partner, task = rng.random(4).tolist()
        caption = sample.value.caption(int(which * len(sample.value.captions)))[: self._options.text_length]
        if whole or task < self._masking.captioning_ratio:
            text_mask = masking.mask_nothing(len(caption)) if whole else masking.mask_caption(len(caption), rng)
            image_mask = np.zeros(self._grid, dtype=bool)
        else:
            if task >= 1 - self._masking.text_dropout:
                caption = caption[:0]
            text_mask = masking.mask_text(len(caption), self._masking, rng)
            image_mask = masking.mask_image(*self._grid, self._masking, rng)
        random_ids = rng.integers(self._vocabulary.text_size, size=int((text_mask[1] == masking.RANDOM).sum()))
        return SampleRandomness(caption, text_mask, image_mask, random_ids, swap, partner)

    def _swapped(self, samples: list[DecodedSample[TokenSample]], draws: list[SampleRandomness]) -> list[tuple[int, int]]:
        """(text, image) indices: each caption with its own image, or with one that it does not describe.

        An empty caption is true of every image: a sample under text dropout keeps its own image and is a positive pair.
        """
        described = self._described(samples)
        partners = list(range(len(samples)))
        for own, drawn in enumerate(draws):
            if len(drawn.caption) and drawn.swap < self._options.itm_negative_ratio:
                caption = drawn.caption.tobytes()
                others = [i for i, captions in enumerate(described) if caption not in captions]
                if others:
                    partners[own] = others[int(drawn.partner * len(others))]
        return list(enumerate(partners))

    def _crossed(
        self, samples: list[DecodedSample[TokenSample]], draws: list[SampleRandomness], rng: np.random.Generator
    ) -> list[tuple[int, int]]:
        """(text, image) indices: crossed pairs of a random half of the samples, each caption with both images of its pair.

        Every caption and every image is in as many positive as negative pairs, so that neither alone predicts the label.
        Four samples keep their own images instead where a caption describes both.
        """
        described = self._described(samples)
        pairs: list[tuple[int, int]] = []
        for a, b, c, d in rng.permutation(len(samples)).reshape(-1, 4).tolist():
            alike = draws[a].caption.tobytes() in described[b] or draws[b].caption.tobytes() in described[a]
            pairs += [(a, a), (b, b), (c, c), (d, d)] if alike else [(a, a), (a, b), (b, b), (b, a)]
        return pairs

    def _described(self, samples: list[DecodedSample[TokenSample]]) -> list[set[bytes]]:
        """The ids of each image's captions as bytes, cut to ``text_length``."""
        return [_texts(sample.value.captions[:, : self._options.text_length]) for sample in samples]

    def _assemble(
        self, texts: list[DecodedSample[TokenSample]], images: list[DecodedSample[TokenSample]], draws: list[SampleRandomness]
    ) -> MaskedBatch[np.ndarray]:
        lengths = np.array([self._layout.length(len(drawn.caption)) for drawn in draws], dtype=np.int64)
        padded = next(length for length in self.lengths if length >= lengths.max())
        arrays = empty_rows(self._vocabulary, len(texts), padded)
        labels = np.full((len(texts), padded), IGNORE, dtype=np.int64)
        itm_label = np.array([text is image for text, image in zip(texts, images, strict=True)], dtype=np.int64)
        for row, drawn in enumerate(draws):
            self._fill(arrays, labels[row] if itm_label[row] else None, row, images[row], drawn)
        return MaskedBatch(
            **arrays,
            lengths=lengths,
            padded=bool(lengths.min() < padded),
            labels=labels,
            itm_label=itm_label,
            masked_text=np.argwhere(within(labels, self._vocabulary.text_range)),
            masked_image=np.argwhere(within(labels, self._vocabulary.image_range)),
            text_origins=[sample.origin for sample in texts],
            image_origins=[sample.origin for sample in images],
        )

    def _fill(
        self,
        arrays: dict[str, np.ndarray],
        labels: np.ndarray | None,
        row: int,
        image: DecodedSample[TokenSample],
        drawn: SampleRandomness,
    ) -> None:
        """Write one sequence into its row, and its labels into ``labels`` (int64 [L]; None for negative pairs)."""
        ids, codes = self._vocabulary, image.value.codes
        if codes.shape != self._grid:
            raise UserError(
                f"{image.origin} has {codes.shape[0]}x{codes.shape[1]} codes, the index says {self._grid[0]}x{self._grid[1]}"
            )
        text_at, image_at = self._layout.write(arrays, row, drawn.caption, codes)
        text, pixels = arrays["tokens"][row, text_at], arrays["tokens"][row, image_at]
        chosen, action = drawn.text_mask
        hidden = drawn.image_mask.reshape(-1)
        if labels is not None:
            np.copyto(labels[text_at], text, where=chosen)
            np.copyto(labels[image_at], pixels, where=hidden)
        np.copyto(text, ids.mask_id, where=action == masking.MASK)
        text[action == masking.RANDOM] = drawn.random_ids
        np.copyto(pixels, ids.mask_id, where=hidden)


def within(labels: Array, ids: range) -> Array:
    """Bool, of the labels' shape: where a label is one of ``ids``."""
    return (labels >= ids.start) & (labels < ids.stop)


def _texts(captions: np.ndarray) -> set[bytes]:
    """The bytes of each row's ids. Rows end in -1, all bits set; an id's highest byte never is 0xff, so stripping is exact."""
    data, width = np.ascontiguousarray(captions, dtype="<i4").tobytes(), 4 * captions.shape[1]
    return {data[start : start + width].rstrip(b"\xff") for start in range(0, len(data), width)}
