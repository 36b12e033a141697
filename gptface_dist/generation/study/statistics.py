"""Shares, means and differences with their uncertainty."""

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
    spread: float | None
    """Standard deviation over seeds of the seeds' means; None for a single seed."""
    trials: int
    """Number of scores."""

    def __str__(self) -> str:
        return f"{Mean(self.share, self.spread):.1%} ({self.low:.1%} to {self.high:.1%})"


@dataclass(frozen=True)
class Mean:
    """A mean over seeds."""

    mean: float
    spread: float | None
    """Standard deviation over seeds; None for a single seed."""

    def __format__(self, spec: str) -> str:
        return f"{self.mean:{spec}}" + (f" ± {self.spread:{spec.lstrip('+')}}" if self.spread is not None else "")


@dataclass(frozen=True)
class Gain:
    """The mean difference of paired scores."""

    mean: float
    low: float
    """Lower end of its 95 % interval."""
    high: float
    """Upper end."""
    spread: float | None
    """Standard deviation over seeds of the seeds' means; None for a single seed."""

    def __str__(self) -> str:
        return f"{Mean(self.mean, self.spread):+.1%} ({self.low:+.1%} to {self.high:+.1%})"


def mean(values: Sequence[float]) -> Mean:
    """Average values, one for each seed."""
    return Mean(float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None)


def share(by_seed: Sequence[Sequence[float] | np.ndarray]) -> Share:
    """Average scores (0 to 1) of independent trials, grouped by seed; there must be at least one.

    Wilson's interval treats each score as 0 or 1: a score between them varies less, so the interval is wide enough.
    """
    scores = np.array([score for scores in by_seed for score in scores], dtype=float)
    n, p = len(scores), float(scores.mean())
    centre, half = p + Z * Z / (2 * n), Z * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    spread = mean([float(np.mean(scores)) for scores in by_seed if len(scores)]).spread
    scale = 1 + Z * Z / n
    return Share(p, max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale), spread, n)


def chance(wanted: Sequence[int], seen: Sequence[int]) -> float:
    """Expected agreement of pictures independent of their prompts: each picture compared with each prompt."""
    values = max([*wanted, *seen]) + 1
    return float(np.dot(np.bincount(wanted, minlength=values), np.bincount(seen, minlength=values)) / (len(wanted) * len(seen)))


def balanced(truth: Sequence[int], seen: Sequence[int]) -> float:
    """Share of each value's trials in which it is seen, averaged over the values in ``truth``; negative values do not count."""
    shares = [
        np.mean([verdict == value for true, verdict in zip(truth, seen, strict=True) if true == value])
        for value in sorted(set(truth))
        if value >= 0
    ]
    return float(np.mean(shares)) if shares else math.nan


def gain(first: Sequence[np.ndarray], second: Sequence[np.ndarray], draws: int = 2000) -> Gain:
    """Gain of the second scores over the first, trial by trial, grouped by seed; the interval is a bootstrap over trials."""
    differences = [after - before for before, after in zip(first, second, strict=True)]
    every = np.concatenate(differences)
    rng = np.random.default_rng(0)
    means = every[rng.integers(len(every), size=(draws, len(every)))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return Gain(float(every.mean()), float(low), float(high), mean([float(of_seed.mean()) for of_seed in differences]).spread)
