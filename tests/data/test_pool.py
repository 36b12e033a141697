"""Work in spawned processes: results in order, the first failure ends it, a killed worker is said to be one."""

import math
import multiprocessing
import operator
import os
import threading
import time
from functools import partial

import pytest

from gptface_dist.data.pool import ordered
from gptface_dist.errors import UserError


@pytest.mark.parametrize("workers", [1, 3])
def test_results_come_in_order(workers: int) -> None:
    assert list(ordered(math.isqrt, [number**2 for number in range(20)], workers)) == list(range(20))
    assert list(ordered(math.isqrt, [], workers)) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_the_first_failure_ends_it_after_the_results_before(workers: int) -> None:
    results = ordered(partial(operator.truediv, 12), [3, 4, 0, 6], workers)
    assert [next(results), next(results)] == [4, 3]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_nothing_of_it_runs_after_it_ended() -> None:
    before = set(threading.enumerate())
    results = ordered(time.sleep, [0, 1, 1, 1, 1], 2)
    next(results)
    results.close()
    assert set(threading.enumerate()) == before
    assert not multiprocessing.active_children()


def test_a_killed_worker_is_a_users_error_not_a_hang() -> None:
    with pytest.raises(UserError, match="a worker process was killed"):
        list(ordered(os._exit, [9, 9, 9], 2))


@pytest.mark.parametrize("workers", [0, -1])
def test_no_workers_are_refused(workers: int) -> None:
    with pytest.raises(UserError, match="at least 1 worker"):
        list(ordered(math.isqrt, [1], workers))
