"""From a block of token samples to arrays for the model: captions chosen, images swapped, tokens masked, padded.

A sequence is ``[CLS] text [SEP] image [SEP]``. All random choices of a sample come from one generator keyed by
(seed, epoch, key), so they are the same whatever the rank, worker or batch they are made in.
"""

import math
from dataclasses import dataclass, field

import numpy as np

from gptface_dist.data import masking
from gptface_dist.data.masking import MaskingOptions
from gptface_dist.data.order import random
from gptface_dist.data.stream import Block, DecodedSample, Provenance
from gptface_dist.data.tokens import TokenSample
from gptface_dist.errors import UserError
from gptface_dist.sequence import IGNORE, SPECIALS_PER_SEQUENCE, Array, PaddedBatch, SequenceLayout, empty_rows
from gptface_dist.tokenizers.vocabulary import Vocabulary


@dataclass(frozen=True)
class BatchOptions:
    """The shape of sequences and the law of pairs."""

    text_length: int = 64
    """Longest caption in tokens; a longer one is cut."""
    buckets: int = 4
    """Number of lengths that batches are padded to, spread evenly from a short caption to ``text_length``."""
    pad_to_multiple_of: int = 16
    """Every padded length is a multiple of this: of the tensor-parallel size under sequence parallelism, and of what
    kernels like."""
    itm_negative_ratio: float = 0.5
    """Probability that the image of a sample with a caption is another sample's (image-text matching)."""
    hard_pair_ratio: float = 0.0
    """Share of blocks that train matching alone, unmasked, on crossed pairs: two captions, each with both images. Blocks
    then have a multiple of 4 samples."""

    def __post_init__(self) -> None:
        if self.text_length < 1 or self.buckets < 1 or self.pad_to_multiple_of < 1:
            found = (self.text_length, self.buckets, self.pad_to_multiple_of)
            raise UserError(f"text_length, buckets and pad_to_multiple_of must be at least 1, got {found}")
        if not 0 <= self.itm_negative_ratio < 1:
            raise UserError(f"itm_negative_ratio must be at least 0 and below 1, got {self.itm_negative_ratio}")
        if not 0 <= self.hard_pair_ratio <= 1:
            raise UserError(f"hard_pair_ratio must lie between 0 and 1, got {self.hard_pair_ratio}")

    def lengths(self, image_tokens: int) -> list[int]:
        """The padded lengths, ascending; the last one holds every sequence."""
        found = set()
        for bucket in range(1, self.buckets + 1):
            length = SPECIALS_PER_SEQUENCE + image_tokens + math.ceil(self.text_length * bucket / self.buckets)
            found.add(math.ceil(length / self.pad_to_multiple_of) * self.pad_to_multiple_of)
        return sorted(found)


@dataclass(frozen=True)
class MaskedBatch(PaddedBatch[Array]):
    """Sequences some of whose tokens are to be predicted, and pairs some of which do not belong together."""

    labels: Array = field(metadata={"pad": IGNORE})
    """int64 [B, L]: the id to predict, :data:`IGNORE` where none is. Negative pairs have none."""
    itm_label: Array = field()
    """int64 [B]: 1 where image and text belong together, 0 where the image is another sample's."""
    masked_text: Array = field()
    """int64 [M, 2]: (row, column) of each label that is a text id, row by row. The labels say the same, but a GPU that
    looks for them makes the host wait for how many there are."""
    masked_image: Array = field()
    """int64 [M, 2]: likewise of image ids."""
    text_origins: list[Provenance] = field(default_factory=list)
    """Where each text comes from."""
    image_origins: list[Provenance] = field(default_factory=list)
    """Where each image comes from."""


@dataclass(frozen=True)
class SampleRandomness:
    """What chance decided for one sample."""

    caption: np.ndarray
    """int32 [length]: the chosen caption, cut; of length 0 where it is dropped."""
    text_mask: tuple[np.ndarray, np.ndarray]
    """Chosen tokens and their actions, of one of masking's functions."""
    image_mask: np.ndarray
    """Bool [H, W]: :func:`masking.mask_image`, or nothing where captioning or matching alone is trained."""
    random_ids: np.ndarray
    """int64 [k]: text ids for the k tokens that become random ones."""
    swap: float
    """Uniform draw that decides whether the image is another sample's."""
    partner: float
    """Uniform draw that decides whose."""


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
        self._layout = SequenceLayout(vocabulary, grid)
        self.lengths = options.lengths(grid[0] * grid[1])
        """The lengths that batches are padded to."""

    def __call__(self, blocks: list[Block[TokenSample]]) -> MaskedBatch[np.ndarray]:
        """One batch of all samples of the blocks, padded to the shortest of ``lengths`` that holds them."""
        texts, images, draws = [], [], []
        for block in blocks:
            rng = random("crossed", self._seed, block.number)
            crossed = rng.random() < self._options.hard_pair_ratio
            drawn = [self._draw(sample, whole=crossed) for sample in block.samples]
            pairs = self._crossed(block.samples, drawn, rng) if crossed else self._swapped(block.samples, drawn)
            texts += [block.samples[text] for text, _ in pairs]
            images += [block.samples[image] for _, image in pairs]
            draws += [drawn[text] for text, _ in pairs]
        return self._assemble(texts, images, draws)

    def _draw(self, sample: DecodedSample[TokenSample], whole: bool) -> SampleRandomness:
        """All that is random about a sample, in a fixed order of draws; ``whole``: nothing is masked."""
        rng = random("sample", self._seed, sample.origin.epoch, sample.origin.key)
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
        """Each caption with its own image, or with one that it does not describe.

        A dropped caption says nothing, which is true of every image: such a sample keeps its own and counts as matched.
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
        """Each caption with its own image and with another one's, of half of the samples, drawn by chance.

        Every caption and every image is in as many matched as swapped pairs, so that only what they say of each other tells
        the two apart. Where a caption describes both images, four samples stay as they are instead.
        """
        described = self._described(samples)
        pairs: list[tuple[int, int]] = []
        for a, b, c, d in rng.permutation(len(samples)).reshape(-1, 4).tolist():
            alike = draws[a].caption.tobytes() in described[b] or draws[b].caption.tobytes() in described[a]
            pairs += [(a, a), (b, b), (c, c), (d, d)] if alike else [(a, a), (a, b), (b, b), (b, a)]
        return pairs

    def _described(self, samples: list[DecodedSample[TokenSample]]) -> list[set[bytes]]:
        """The captions of each image, cut as they are used."""
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
        """Write one sequence into its row, and what is to be predicted into ``labels`` (int64 [L]; None: nothing is)."""
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
