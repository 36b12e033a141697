"""Shares with their uncertainty."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Z = 1.959964
"""The normal distribution's 97.5 % point."""


@dataclass(frozen=True)
class Share:
    """A mean of scores between 0 and 1, with its 95 % interval and its spread over seeds."""

    share: float
    """The mean."""
    low: float
    """Lower end of the interval."""
    high: float
    """Upper end."""
    spread: float
    """Standard deviation over seeds of the seeds' means."""
    trials: int
    """How many scores."""

    def __str__(self) -> str:
        return f"{self.share:.1%} ({self.low:.1%} to {self.high:.1%})"


def share(by_seed: Sequence[Sequence[float] | np.ndarray]) -> Share:
    """Of scores (0 to 1) of independent trials, grouped by seed; at least one in all.

    Wilson's interval for the mean as if every score were 0 or 1: a score between them varies less, so it is wide enough.
    """
    scores = np.array([score for scores in by_seed for score in scores], dtype=float)
    n, p = len(scores), float(scores.mean())
    centre, half = p + Z * Z / (2 * n), Z * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    means = [float(np.mean(scores)) for scores in by_seed if len(scores)]
    spread = float(np.std(means, ddof=1)) if len(means) > 1 else 0.0
    scale = 1 + Z * Z / n
    return Share(p, max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale), spread, n)


def chance(asked: Sequence[int], seen: Sequence[int]) -> float:
    """Expected agreement if the pictures had nothing to do with their prompts: every picture against every prompt."""
    values = max([*asked, *seen]) + 1
    return float(np.dot(np.bincount(asked, minlength=values), np.bincount(seen, minlength=values)) / (len(asked) * len(seen)))


def balanced(truth: Sequence[int], seen: Sequence[int]) -> float:
    """Share of each value's trials in which it is seen, mean over the values that ``truth`` has; negative ones do not count."""
    shares = [
        np.mean([found == value for true, found in zip(truth, seen, strict=True) if true == value])
        for value in sorted(set(truth))
        if value >= 0
    ]
    return float(np.mean(shares)) if shares else math.nan


def paired_difference(first: np.ndarray, second: np.ndarray, seed: int = 0, draws: int = 2000) -> tuple[float, float]:
    """95 % interval (bootstrap over pairs) of the mean of ``second - first``."""
    difference = second - first
    rng = np.random.default_rng(seed)
    means = difference[rng.integers(len(difference), size=(draws, len(difference)))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
