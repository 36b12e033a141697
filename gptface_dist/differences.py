"""Differences of numbers, in which nothing gets lost: ``max`` drops NaN or keeps it, by its place."""

import math
from collections.abc import Iterable


def largest(differences: Iterable[float]) -> float:
    """The largest; NaN if one is. 0 of none."""
    numbers = list(differences)
    return math.nan if any(map(math.isnan, numbers)) else max(numbers, default=0.0)


def relative(value: float, truth: float) -> float:
    """``|value - truth| / |truth|``: 0 where both are 0, infinite where the truth alone is, NaN where one is not a number."""
    distance = abs(value - truth)
    if truth == 0:
        return distance * math.inf if distance else 0.0
    return distance / abs(truth)
