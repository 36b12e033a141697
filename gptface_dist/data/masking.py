"""Choose the tokens to predict: spans of text, blocks of image.

Text follows SpanBERT (Joshi et al. 2020): span lengths are geometric with p = 0.2, cut at 10 (mean 3.797), until 15 % of
the tokens are covered; each span is replaced by [MASK] (80 %), by random tokens (10 %), or kept (10 %), one draw a span.
Images are masked in two-dimensional blocks at a ratio cos(pi u / 2), u ~ U(0, 1), as in MaskGIT (Chang et al. 2022), which
reaches 100 %, so that generation from an empty grid is trained. Both are reconstructions: GPTFace's numbers are not public.

Two shares of the samples are masked otherwise. Masking 15 % of a text hardly trains captioning, so a ``captioning_ratio`` of
the samples have a whole image and a text masked at the cosine ratio. Classifier-free guidance (Ho and Salimans 2022) needs a
model trained on images without text, so a ``text_dropout`` of the samples have an empty text.
"""

import functools
import math
from dataclasses import dataclass

import numpy as np

from gptface_dist.errors import UserError

KEEP, MASK, RANDOM = 0, 1, 2
"""Input in place of a token to predict: the token itself, [MASK], or a random text token."""


@dataclass(frozen=True)
class MaskingOptions:
    """Distribution of the tokens to predict."""

    spans: bool = True
    """Mask spans of text and blocks of image; False masks the same number of tokens independently (for ablation)."""
    text_ratio: float = 0.15
    """Share of text tokens to predict, rounded to whole tokens, at least one."""
    span_p: float = 0.2
    """Parameter of the geometric distribution of span lengths."""
    span_longest: int = 10
    """Longest span of text, in tokens."""
    mask_share: float = 0.8
    """Share of text spans replaced by [MASK]."""
    random_share: float = 0.1
    """Share of text spans replaced by random text tokens; the rest are kept unchanged."""
    block_smallest: int = 4
    """Smallest target size of a block, in image tokens."""
    block_aspect: float = 3.0
    """Largest ratio of a block's sides."""
    captioning_ratio: float = 0.2
    """Share of samples that train captioning: a whole image, and a text masked at the cosine ratio, up to all of it."""
    text_dropout: float = 0.1
    """Share of samples whose text is dropped, for classifier-free guidance."""

    def __post_init__(self) -> None:
        if not 0 < self.text_ratio <= 1:
            raise UserError(f"text_ratio must be above 0 and at most 1, got {self.text_ratio}")
        if not 0 < self.span_p < 1 or self.span_longest < 1:
            raise UserError(
                f"span_p must lie between 0 and 1 and span_longest be at least 1: {self.span_p}, {self.span_longest}"
            )
        if min(self.mask_share, self.random_share) < 0 or self.mask_share + self.random_share > 1:
            raise UserError(
                f"mask_share {self.mask_share} and random_share {self.random_share} must be shares that add up to 1 or less"
            )
        if min(self.captioning_ratio, self.text_dropout) < 0 or self.captioning_ratio + self.text_dropout > 1:
            raise UserError(
                f"captioning_ratio {self.captioning_ratio} and text_dropout {self.text_dropout} must be shares that add up to "
                "1 or less"
            )
        if self.block_smallest < 1 or self.block_aspect < 1:
            raise UserError(f"block_smallest and block_aspect must be at least 1: {self.block_smallest}, {self.block_aspect}")


@functools.cache
def span_law(p: float, longest: int) -> np.ndarray:
    """float64 [longest]: cumulative P(length <= k), k = 1 .. longest, of the geometric distribution cut at ``longest``."""
    weights = p * (1 - p) ** np.arange(longest)
    return np.cumsum(weights / weights.sum())


def span_lengths(count: int, options: MaskingOptions, rng: np.random.Generator) -> np.ndarray:
    """int64 [count]: span lengths drawn from :func:`span_law`; the end of a text may still cut one short."""
    return 1 + np.searchsorted(span_law(options.span_p, options.span_longest), rng.random(count), side="right")


def budget(length: int, ratio: float) -> int:
    """Number of text tokens to predict: ``ratio * length``, halves rounded up, at least 1 unless ``length`` is 0."""
    return 0 if length == 0 else max(1, math.floor(ratio * length + 0.5))


def mask_text(length: int, options: MaskingOptions, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Choose the text tokens to predict.

    Returns ``chosen`` (bool [length]) and ``action`` (int8 [length]: :data:`KEEP`, :data:`MASK` or :data:`RANDOM`, one for
    each span). Exactly :func:`budget` tokens are chosen: the text is tiled with spans from left to right, the spans are
    taken in random order, one that would exceed the budget is passed over; if none fits any more, one is cut short.
    """
    chosen = np.zeros(length, dtype=bool)
    action = np.zeros(length, dtype=np.int8)
    left = budget(length, options.text_ratio)
    lengths = span_lengths(length, options, rng) if options.spans else np.ones(length, dtype=np.int64)
    stops = np.minimum(np.cumsum(lengths), length)
    starts = np.concatenate([[0], stops])[:length]
    spans = np.flatnonzero(stops > starts)
    draws = rng.random(length)
    passed: int | None = None
    for span in rng.permutation(spans).tolist():
        if left == 0:
            break
        if stops[span] - starts[span] <= left:
            left -= _take(chosen, action, starts[span], stops[span], draws[span], options)
        elif passed is None:
            passed = span
    if left and passed is not None:
        _take(chosen, action, starts[passed], starts[passed] + left, draws[passed], options)
    return chosen, action


def _take(chosen: np.ndarray, action: np.ndarray, start: int, stop: int, draw: float, options: MaskingOptions) -> int:
    chosen[start:stop] = True
    if draw < options.mask_share:
        action[start:stop] = MASK
    elif draw < options.mask_share + options.random_share:
        action[start:stop] = RANDOM
    return stop - start


def mask_caption(length: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """As :func:`mask_text`, for captioning: ``ceil(cosine_ratio(u) * length)`` tokens, chosen independently, all [MASK]."""
    chosen = np.zeros(length, dtype=bool)
    count = math.ceil(cosine_ratio(rng.random()) * length)
    chosen[rng.permutation(length)[:count]] = True
    return chosen, np.where(chosen, MASK, KEEP).astype(np.int8)


def mask_nothing(length: int) -> tuple[np.ndarray, np.ndarray]:
    """As :func:`mask_text`, with no token chosen."""
    return np.zeros(length, dtype=bool), np.full(length, KEEP, dtype=np.int8)


def cosine_ratio(u: float) -> float:
    """Share of tokens to predict for a uniform draw ``u`` in [0, 1): ``cos(pi u / 2)``, mean 2 / pi."""
    return math.cos(math.pi * u / 2)


def mask_image(height: int, width: int, options: MaskingOptions, rng: np.random.Generator) -> np.ndarray:
    """bool [height, width]: the image tokens to predict, ``ceil(cosine_ratio(u) * height * width)`` of them.

    Every block is centred on a token that is not yet masked and clipped to the grid; the last block is cut to reach the
    number exactly. All chosen tokens become [MASK].
    """
    total = height * width
    left = min(total, max(1, math.ceil(cosine_ratio(rng.random()) * total)))
    if left == total:
        return np.ones((height, width), dtype=bool)
    free = np.ones((height, width), dtype=bool)
    if not options.spans:
        free.flat[rng.permutation(total)[:left]] = False
        return ~free
    while left > 0:
        where, size, shape = rng.random(3).tolist()
        candidates = free.ravel().nonzero()[0]
        row, column = divmod(int(candidates[int(where * len(candidates))]), width)
        smallest = min(options.block_smallest, left)
        area = smallest + size * (left - smallest)
        aspect = options.block_aspect ** (2 * shape - 1)
        tall = min(height, max(1, round(math.sqrt(area * aspect))))
        wide = min(width, max(1, round(math.sqrt(area / aspect))))
        top = min(max(0, row - tall // 2), height - tall)
        start = min(max(0, column - wide // 2), width - wide)
        block = free[top : top + tall, start : start + wide]
        new = int(np.count_nonzero(block))
        if new <= left:
            block[:] = False
        else:
            rows, columns = block.nonzero()
            block[rows[:left], columns[:left]] = False
        left -= new
    return ~free
