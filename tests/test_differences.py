"""Nothing gets lost in a maximum; nothing is divided by zero."""

import itertools
import math

import pytest

from gptface_dist.differences import largest, relative


def test_nan_is_the_largest_wherever_it_stands() -> None:
    for numbers in itertools.permutations((0.0, 1.0, math.nan, math.inf)):
        assert math.isnan(largest(numbers))
    assert largest(iter([0.0, 3.0, 2.0])) == 3.0
    assert largest([]) == 0.0


@pytest.mark.parametrize(
    ("value", "truth", "expected"),
    [
        (2.2, 2.0, 0.1),
        (-1.8, -2.0, 0.1),
        (0.0, 0.0, 0.0),
        (1e-9, 0.0, math.inf),
        (math.nan, 0.0, math.nan),
        (0.0, math.nan, math.nan),
    ],
)
def test_relative(value: float, truth: float, expected: float) -> None:
    assert relative(value, truth) == pytest.approx(expected, nan_ok=True)
