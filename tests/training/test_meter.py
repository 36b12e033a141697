"""Where a step's time went, and what it worked on."""

import dataclasses
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gptface_dist.engine import parity_case
from gptface_dist.engine.engine import StepResult
from gptface_dist.model.flops import Work
from gptface_dist.objectives.milm_itm import MilmItm
from gptface_dist.parallel.layout import Layout
from gptface_dist.training.meter import Meter
from tests.fake_cuda import DEVICE, fake_cuda

SUMS = torch.tensor([[1.0, 2.0, 30.0], [1.0, 2.0, 50.0], [1.0, 2.0, 8.0]], dtype=torch.float64)
WORK = Work(tokens=400, pairs=20_000, counts=(30, 50, 8))
RESULT = StepResult(SUMS, loss=1.0, grad_norm=1.0, allgather_bytes=0, samples=8, work=WORK)
PARTS = ("seconds/data", "seconds/forward_backward", "seconds/optimizer")


class Clock:
    """A clock that stands still unless it is moved."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(time, "perf_counter", made)
    return made


def step(clock: Clock, device: torch.device) -> tuple[Meter, dict[str, float]]:
    """Data for 1 s, and by the host's clock 2 s forward and backward, 4 s optimizer."""
    engine: Any = SimpleNamespace(objective=MilmItm(), device=device)
    meter = Meter(parity_case.MODEL, parity_case.VOCABULARY, Layout(dp=2, zero=0), "float32", engine)
    return meter, once(meter, clock)


def once(meter: Meter, clock: Clock) -> dict[str, float]:
    """A step."""
    meter.begin()
    clock.now += 1
    meter.mark()
    clock.now += 2
    meter.mark()
    clock.now += 4
    return meter.end(RESULT)


def test_a_step_has_three_parts(clock: Clock) -> None:
    _, record = step(clock, torch.device("cpu"))
    assert [record[part] for part in PARTS] == [1, 2, 4]
    assert record["seconds"] == 7
    assert record["tokens"] == 400
    assert record["tokens_per_s"] == pytest.approx(400 / 7)
    assert record["samples_per_s"] == pytest.approx(8 / 7)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the fake GPU stands in for CUDA")
def test_a_gpu_times_itself(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """By events, 250 ms apart on the fake one: the host runs ahead of it, and is not made to wait."""
    with fake_cuda(monkeypatch) as gpu:
        meter, first = step(clock, DEVICE)
        second = once(meter, clock)
        assert gpu.waits == []
    assert [first[part] for part in PARTS] == [1, 0.25, 0]
    assert [second[part] for part in PARTS] == [1, 0.25, 0.25], "the update of the step before"


def test_flops_are_of_the_tokens_and_their_pairs(clock: Clock) -> None:
    meter, record = step(clock, torch.device("cpu"))
    more = meter.end(dataclasses.replace(RESULT, work=dataclasses.replace(WORK, pairs=WORK.pairs + 1000)))
    assert more["tflops_per_rank"] > record["tflops_per_rank"]
