"""The learning rate over time."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptface_dist.errors import UserError
from gptface_dist.training.schedule import SCHEDULES, ScheduleOptions


def test_values_computed_by_hand() -> None:
    cosine = ScheduleOptions("cosine", warmup_steps=2, min_lr_ratio=0.1)
    assert [cosine.factor(step, 6) for step in range(6)] == pytest.approx(
        [0.5, 1.0, *(0.1 + 0.9 * (1 + math.cos(math.pi * quarter / 4)) / 2 for quarter in (1, 2, 3, 4))]
    )
    linear = ScheduleOptions("linear", warmup_steps=1, min_lr_ratio=0.0)
    assert [linear.factor(step, 5) for step in range(5)] == pytest.approx([1, 0.75, 0.5, 0.25, 0])
    constant = ScheduleOptions("constant", warmup_steps=2, decay_steps=2, min_lr_ratio=0.5)
    assert [constant.factor(step, 6) for step in range(6)] == pytest.approx([0.5, 1, 1, 1, 0.75, 0.5])
    assert [ScheduleOptions("constant", warmup_steps=0).factor(step, 3) for step in range(3)] == [1, 1, 1]


@given(st.sampled_from(SCHEDULES), st.integers(0, 20), st.integers(0, 20), st.integers(1, 50), st.floats(0, 1))
def test_rises_to_the_peak_and_falls_to_the_floor(shape: str, warmup_steps: int, decay: int, rest: int, floor: float) -> None:
    options = ScheduleOptions(shape, warmup_steps, decay if shape == "constant" else 0, floor)
    steps = warmup_steps + options.decay_steps + rest
    options.check(steps)
    factors = [options.factor(step, steps) for step in range(steps)]
    assert all(0 <= factor <= 1 for factor in factors)
    assert factors[:warmup_steps] == sorted(factors[:warmup_steps])
    assert factors[max(0, warmup_steps - 1) :] == sorted(factors[max(0, warmup_steps - 1) :], reverse=True)
    if warmup_steps:
        assert factors[warmup_steps - 1] == 1
    if shape != "constant" or options.decay_steps:
        assert factors[-1] == pytest.approx(floor)
    # A run that goes on after its last step stays where it was.
    assert options.factor(steps + 5, steps) == pytest.approx(factors[-1])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"name": "square"}, "schedule.name"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"name": "cosine", "decay_steps": 5}, "decay_steps"),
        ({"min_lr_ratio": 1.5}, "min_lr_ratio"),
    ],
)
def test_nonsense_is_refused_by_name(options: dict, named: str) -> None:
    with pytest.raises(UserError, match=named):
        ScheduleOptions(**options)


def test_a_run_shorter_than_its_schedule_is_refused() -> None:
    with pytest.raises(UserError, match="10 steps"):
        ScheduleOptions(warmup_steps=11).check(10)
