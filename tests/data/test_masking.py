"""Masking: the laws, exact budgets, and shapes at every size."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptface_dist.data.masking import (
    KEEP,
    MASK,
    RANDOM,
    MaskingOptions,
    budget,
    cosine_ratio,
    mask_caption,
    mask_image,
    mask_text,
    span_law,
    span_lengths,
)
from gptface_dist.data.order import keyed_generator
from gptface_dist.errors import UserError

SPANS = MaskingOptions()
TOKENS = MaskingOptions(spans=False)

# P(length = k), k = 1 .. 10, as published for SpanBERT, to three digits.
PUBLISHED = [0.224, 0.179, 0.143, 0.115, 0.092, 0.073, 0.059, 0.047, 0.038, 0.030]


def test_span_lengths_follow_the_published_law() -> None:
    assert np.allclose(np.diff(span_law(0.2, 10), prepend=0), PUBLISHED, atol=6e-4)
    drawn = span_lengths(200_000, SPANS, keyed_generator("test"))
    shares = np.bincount(drawn, minlength=11)[1:] / len(drawn)
    # Standard error of a share is below 0.001 here.
    assert np.allclose(shares, PUBLISHED, atol=0.005)
    assert drawn.mean() == pytest.approx(3.797, abs=0.03)


def runs(chosen: np.ndarray) -> list[int]:
    edges = np.flatnonzero(np.diff(np.concatenate([[0], chosen.astype(int), [0]])))
    return (edges[1::2] - edges[::2]).tolist()


def test_masked_runs_are_spans_not_single_tokens() -> None:
    rng = keyed_generator("runs")
    spans = [run for _ in range(300) for run in runs(mask_text(400, SPANS, rng)[0])]
    singles = [run for _ in range(300) for run in runs(mask_text(400, TOKENS, rng)[0])]
    # Neighbouring spans merge, the last one may be cut: the mean lies near 3.8 for spans, near 1 / (1 - 0.15) for tokens.
    assert 3.6 < np.mean(spans) < 5.0
    assert np.mean(singles) == pytest.approx(1 / 0.85, abs=0.02)


@settings(max_examples=300, deadline=None)
@given(
    length=st.integers(0, 512), seed=st.integers(0, 10**6), spans=st.booleans(), ratio=st.sampled_from([0.01, 0.15, 0.5, 1.0])
)
def test_text_budget_is_met_exactly(length: int, seed: int, spans: bool, ratio: float) -> None:
    options = MaskingOptions(spans=spans, text_ratio=ratio)
    chosen, action = mask_text(length, options, keyed_generator(seed))
    assert chosen.shape == action.shape == (length,)
    assert chosen.dtype == bool
    assert chosen.sum() == budget(length, ratio)
    assert set(np.unique(action)) <= {KEEP, MASK, RANDOM}
    assert not action[~chosen].any()


def test_budget_by_hand() -> None:
    assert [budget(n, 0.15) for n in (0, 1, 3, 10, 13, 20, 64, 512)] == [0, 1, 1, 2, 2, 3, 10, 77]


def test_actions_are_80_10_10_by_span() -> None:
    rng = keyed_generator("actions")
    taken = np.concatenate([action[chosen] for chosen, action in (mask_text(200, SPANS, rng) for _ in range(3000))])
    shares = [np.mean(taken == action) for action in (MASK, RANDOM, KEEP)]
    assert shares == pytest.approx([0.8, 0.1, 0.1], abs=0.015)


def test_one_span_has_one_action() -> None:
    """With everything masked, [MASK] or random at even odds, the action changes at every other span boundary."""
    rng = keyed_generator("one action")

    def changes(options: MaskingOptions) -> float:
        actions = [mask_text(400, options, rng)[1] for _ in range(300)]
        return float(np.mean([(action[1:] != action[:-1]).mean() for action in actions]))

    even = {"text_ratio": 1.0, "mask_share": 0.5, "random_share": 0.5}
    assert changes(MaskingOptions(spans=True, **even)) == pytest.approx(0.5 / 3.797, abs=0.01)
    assert changes(MaskingOptions(spans=False, **even)) == pytest.approx(0.5, abs=0.01)


@settings(max_examples=200, deadline=None)
@given(height=st.integers(4, 32), width=st.integers(4, 32), seed=st.integers(0, 10**6), spans=st.booleans())
def test_image_mask_has_as_many_tokens_as_its_ratio_says(height: int, width: int, seed: int, spans: bool) -> None:
    masked = mask_image(height, width, MaskingOptions(spans=spans), keyed_generator(seed))
    # The first draw of the same generator is the ratio's.
    wanted = int(np.ceil(np.cos(np.pi / 2 * keyed_generator(seed).random()) * height * width))
    assert masked.shape == (height, width)
    assert masked.dtype == bool
    assert masked.sum() == wanted >= 1


def test_image_ratios_follow_the_cosine_law() -> None:
    rng = keyed_generator("ratios")
    ratios = np.array([mask_image(16, 16, TOKENS, rng).mean() for _ in range(4000)])
    # Kolmogorov-Smirnov at the ratios that a grid of 256 tokens can have: P(ratio <= r) = 1 - 2/pi arccos(r), 1 % bound.
    grid = np.arange(257) / 256
    found = (ratios[:, None] <= grid).mean(axis=0)
    assert np.abs(found - (1 - 2 / np.pi * np.arccos(grid))).max() < 1.63 / np.sqrt(len(ratios))
    assert ratios.mean() == pytest.approx(2 / np.pi, abs=0.02)
    assert (ratios == 1).mean() > 0.03, "complete masks must occur: generation from nothing is trained on them"
    assert cosine_ratio(0.0) == 1.0


@settings(max_examples=200, deadline=None)
@given(length=st.integers(0, 128), seed=st.integers(0, 10**6))
def test_captions_have_as_many_tokens_masked_as_their_ratio_says(length: int, seed: int) -> None:
    chosen, action = mask_caption(length, keyed_generator(seed))
    assert chosen.shape == action.shape == (length,)
    assert chosen.sum() == np.ceil(np.cos(np.pi / 2 * keyed_generator(seed).random()) * length) >= min(length, 1)
    assert (action == np.where(chosen, MASK, KEEP)).all()


def test_caption_ratios_follow_the_cosine_law_and_places_are_alike() -> None:
    rng = keyed_generator("captions")
    masks = np.array([mask_caption(40, rng)[0] for _ in range(4000)])
    ratios = masks.mean(axis=1)
    grid = np.arange(41) / 40
    found = (ratios[:, None] <= grid).mean(axis=0)
    assert np.abs(found - (1 - 2 / np.pi * np.arccos(grid))).max() < 1.63 / np.sqrt(len(ratios))
    assert (ratios == 1).mean() > 0.08, "complete masks must occur: captioning from nothing is trained on them"
    assert np.ptp(masks.mean(axis=0)) < 0.08


def neighbours(masked: np.ndarray) -> float:
    """Share of neighbouring pairs of tokens with equal state."""
    return float(np.mean([(masked[1:] == masked[:-1]).mean(), (masked[:, 1:] == masked[:, :-1]).mean()]))


def test_image_masks_are_blocks() -> None:
    rng = keyed_generator("blocks")
    halves = [m for m in (mask_image(16, 16, SPANS, rng) for _ in range(600)) if 0.4 < m.mean() < 0.6]
    singles = [m for m in (mask_image(16, 16, TOKENS, rng) for _ in range(600)) if 0.4 < m.mean() < 0.6]
    assert np.mean([neighbours(m) for m in halves]) > 0.8
    assert np.mean([neighbours(m) for m in singles]) == pytest.approx(0.5, abs=0.03)


def test_every_image_token_is_masked_about_as_often() -> None:
    rng = keyed_generator("coverage")
    frequency = np.mean([mask_image(8, 8, SPANS, rng) for _ in range(4000)], axis=0)
    assert frequency.min() > 0.5 * frequency.mean()
    assert frequency.max() < 1.3 * frequency.mean()


@pytest.mark.parametrize(
    "wrong",
    [
        {"text_ratio": 0},
        {"text_ratio": 1.1},
        {"span_p": 0},
        {"span_longest": 0},
        {"mask_share": 0.95},
        {"block_aspect": 0.5},
        {"captioning_ratio": -0.1},
        {"captioning_ratio": 0.95},
        {"text_dropout": 0.85},
    ],
)
def test_impossible_options_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong)).split("_")[0]):
        MaskingOptions(**wrong)  # type: ignore[arg-type]
