"""From a block of token samples to arrays for the model: captions chosen, images swapped, tokens masked, padded.

A sequence is ``[CLS] text [SEP] image [SEP]``. All random choices of a sample come from one generator keyed by
(seed, epoch, key), so they are the same whatever the rank, worker or batch they are made in.
"""

import math
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import numpy as np
import torch

from gptface_dist import host
from gptface_dist.data import masking
from gptface_dist.data.masking import MaskingOptions
from gptface_dist.data.order import random
from gptface_dist.data.stream import Block, Delivered, Origin
from gptface_dist.data.tokens import TokenSample
from gptface_dist.errors import UserError
from gptface_dist.sequence import IGNORE, IMAGE, PADDING, SPECIALS_PER_SEQUENCE, TEXT
from gptface_dist.tokenizers.vocabulary import Vocabulary

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
    """Probability that the image of a sample with a caption is another sample's (image-text matching)."""
    crossed_share: float = 0.0
    """Share of blocks that train matching alone, unmasked, on crossed pairs: two captions, each with both images. Blocks
    then have a multiple of 4 samples."""

    def __post_init__(self) -> None:
        if self.text_length < 1 or self.buckets < 1 or self.multiple_of < 1:
            found = (self.text_length, self.buckets, self.multiple_of)
            raise UserError(f"text_length, buckets and multiple_of must be at least 1, got {found}")
        if not 0 <= self.swap_share < 1:
            raise UserError(f"swap_share must be at least 0 and below 1, got {self.swap_share}")
        if not 0 <= self.crossed_share <= 1:
            raise UserError(f"crossed_share must lie between 0 and 1, got {self.crossed_share}")

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
    masked_text: Array
    """int64 [M, 2]: (row, column) of each label that is a text id, row by row. The labels say the same, but a GPU that
    looks for them makes the host wait for how many there are."""
    masked_image: Array
    """int64 [M, 2]: likewise of image ids."""
    padded: bool
    """Whether some sequence is shorter than L; for the host, as the lengths of ``masked_text`` and ``masked_image`` are."""
    text_origins: list[Origin]
    """Where each text comes from."""
    image_origins: list[Origin]
    """Where each image comes from."""

    def tensors(self, device: torch.device | str = "cpu") -> "Batch[torch.Tensor]":
        """The same batch as tensors on a device; on a GPU, the copies may still be under way."""

        def move(array: Array) -> torch.Tensor:
            return host.to_device(torch.as_tensor(array), device)

        return Batch(
            tokens=move(self.tokens),
            labels=move(self.labels),
            segments=move(self.segments),
            positions=move(self.positions),
            lengths=move(self.lengths),
            matched=move(self.matched),
            masked_text=move(self.masked_text),
            masked_image=move(self.masked_image),
            padded=self.padded,
            text_origins=self.text_origins,
            image_origins=self.image_origins,
        )


@dataclass(frozen=True)
class _Draws:
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
        self._image_positions = np.stack(np.divmod(np.arange(grid[0] * grid[1]), grid[1]), axis=1)
        self.lengths = options.lengths(grid[0] * grid[1])
        """The lengths that batches are padded to."""

    def __call__(self, blocks: list[Block[TokenSample]]) -> Batch[np.ndarray]:
        """One batch of all samples of the blocks, padded to the shortest of ``lengths`` that holds them."""
        texts, images, draws = [], [], []
        for block in blocks:
            rng = random("crossed", self._seed, block.number)
            crossed = rng.random() < self._options.crossed_share
            drawn = [self._draw(sample, whole=crossed) for sample in block.samples]
            pairs = self._crossed(block.samples, drawn, rng) if crossed else self._swapped(block.samples, drawn)
            texts += [block.samples[text] for text, _ in pairs]
            images += [block.samples[image] for _, image in pairs]
            draws += [drawn[text] for text, _ in pairs]
        return self._assemble(texts, images, draws)

    def _draw(self, sample: Delivered[TokenSample], whole: bool) -> _Draws:
        """All that is random about a sample, in a fixed order of draws; ``whole``: nothing is masked."""
        rng = random("sample", self._seed, sample.origin.epoch, sample.origin.key)
        which, swap, partner, task = rng.random(4).tolist()
        caption = sample.value.caption(int(which * len(sample.value.captions)))[: self._options.text_length]
        if whole or task < self._masking.caption_share:
            text_mask = masking.mask_nothing(len(caption)) if whole else masking.mask_caption(len(caption), rng)
            image_mask = np.zeros(self._grid, dtype=bool)
        else:
            if task >= 1 - self._masking.drop_share:
                caption = caption[:0]
            text_mask = masking.mask_text(len(caption), self._masking, rng)
            image_mask = masking.mask_image(*self._grid, self._masking, rng)
        random_ids = rng.integers(self._vocabulary.text_size, size=int((text_mask[1] == masking.RANDOM).sum()))
        return _Draws(caption, text_mask, image_mask, random_ids, swap, partner)

    def _swapped(self, samples: list[Delivered[TokenSample]], draws: list[_Draws]) -> list[tuple[int, int]]:
        """Each caption with its own image, or with one that it does not describe.

        A dropped caption says nothing, which is true of every image: such a sample keeps its own and counts as matched.
        """
        described = self._described(samples)
        partners = list(range(len(samples)))
        for own, drawn in enumerate(draws):
            if len(drawn.caption) and drawn.swap < self._options.swap_share:
                caption = drawn.caption.tobytes()
                others = [i for i, captions in enumerate(described) if caption not in captions]
                if others:
                    partners[own] = others[int(drawn.partner * len(others))]
        return list(enumerate(partners))

    def _crossed(
        self, samples: list[Delivered[TokenSample]], draws: list[_Draws], rng: np.random.Generator
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

    def _described(self, samples: list[Delivered[TokenSample]]) -> list[set[bytes]]:
        """The captions of each image, cut as they are used."""
        return [_texts(sample.value.captions[:, : self._options.text_length]) for sample in samples]

    def _assemble(
        self, texts: list[Delivered[TokenSample]], images: list[Delivered[TokenSample]], draws: list[_Draws]
    ) -> Batch[np.ndarray]:
        image_tokens = self._grid[0] * self._grid[1]
        lengths = np.array([len(drawn.caption) + image_tokens + SPECIALS_PER_SEQUENCE for drawn in draws], dtype=np.int64)
        shape = (len(texts), next(length for length in self.lengths if length >= lengths.max()))
        batch = Batch(
            tokens=np.full(shape, self._vocabulary.pad_id, dtype=np.int64),
            labels=np.full(shape, IGNORE, dtype=np.int64),
            segments=np.full(shape, PADDING, dtype=np.int64),
            positions=np.zeros((*shape, 2), dtype=np.int64),
            lengths=lengths,
            matched=np.array([text is image for text, image in zip(texts, images, strict=True)], dtype=np.int64),
            masked_text=np.empty((0, 2), dtype=np.int64),
            masked_image=np.empty((0, 2), dtype=np.int64),
            padded=bool(lengths.min() < shape[1]),
            text_origins=[sample.origin for sample in texts],
            image_origins=[sample.origin for sample in images],
        )
        for row, drawn in enumerate(draws):
            self._fill(batch, row, images[row], drawn)
        return replace(
            batch,
            masked_text=np.argwhere(within(batch.labels, self._vocabulary.text_range)),
            masked_image=np.argwhere(within(batch.labels, self._vocabulary.image_range)),
        )

    def _fill(self, batch: Batch[np.ndarray], row: int, image: Delivered[TokenSample], drawn: _Draws) -> None:
        """Write one sequence into its row."""
        ids, codes = self._vocabulary, image.value.codes
        if codes.shape != self._grid:
            raise UserError(
                f"{image.origin} has {codes.shape[0]}x{codes.shape[1]} codes, the index says {self._grid[0]}x{self._grid[1]}"
            )
        first_sep = 1 + len(drawn.caption)
        last_sep = first_sep + 1 + codes.size
        text_at, image_at = slice(1, first_sep), slice(first_sep + 1, last_sep)

        tokens = batch.tokens[row]
        tokens[0], tokens[first_sep], tokens[last_sep] = ids.cls_id, ids.sep_id, ids.sep_id
        text, pixels = tokens[text_at], tokens[image_at]
        text[:] = drawn.caption
        np.add(codes.reshape(-1), ids.image_offset, out=pixels, dtype=np.int64)

        chosen, action = drawn.text_mask
        hidden = drawn.image_mask.reshape(-1)
        if batch.matched[row]:
            np.copyto(batch.labels[row, text_at], text, where=chosen)
            np.copyto(batch.labels[row, image_at], pixels, where=hidden)
        np.copyto(text, ids.mask_id, where=action == masking.MASK)
        text[action == masking.RANDOM] = drawn.random_ids
        np.copyto(pixels, ids.mask_id, where=hidden)

        batch.segments[row, : last_sep + 1] = TEXT
        batch.segments[row, image_at] = IMAGE
        batch.positions[row, : first_sep + 1, 0] = np.arange(first_sep + 1)
        batch.positions[row, image_at] = self._image_positions
        batch.positions[row, last_sep, 0] = first_sep + 1


def within(labels: Array, ids: range) -> Array:
    """Bool, of the labels' shape: where a label is one of ``ids``."""
    return (labels >= ids.start) & (labels < ids.stop)


def _texts(captions: np.ndarray) -> set[bytes]:
    """The bytes of each row's ids. Rows end in -1, all bits set; an id's highest byte never is 0xff, so stripping is exact."""
    data, width = np.ascontiguousarray(captions, dtype="<i4").tobytes(), 4 * captions.shape[1]
    return {data[start : start + width].rstrip(b"\xff") for start in range(0, len(data), width)}
