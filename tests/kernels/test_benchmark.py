"""The benchmarks: every way runs and is compared with the truth; what is read off the times; and no GPU is said plainly."""

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from gptface_dist.errors import UserError
from gptface_dist.kernels.attention import curves
from gptface_dist.kernels.attention.benchmark import Comparison, Speed, Untimed, compare, crossover
from gptface_dist.kernels.attention.options import BACKWARDS
from gptface_dist.kernels.attention.shapes import Shape
from gptface_dist.kernels.loss import benchmark as loss
from gptface_dist.model.attention import sdpa
from gptface_dist.tools.main import app

runner = CliRunner()
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("qk_norm", [False, True])
def test_every_way_is_called_and_right(qk_norm: bool) -> None:
    calls = 0

    def timer(call: object) -> float:
        nonlocal calls
        assert callable(call)
        call()
        calls += 1
        return 2.0

    found = list(compare(Shape(40, 64, 1, 1), timer, DEVICE, Comparison(qk_norm=qk_norm)))
    speeds = {one.way: one for one in found if isinstance(one, Speed)}
    tails = ("", ", quantised before", *([", QK-norm apart"] if qk_norm else []))
    ways = {f"fp8, backward {backward}{tail}" for backward in BACKWARDS for tail in tails}
    untimed = {one.way for one in found if isinstance(one, Untimed)}
    assert set(speeds) | untimed == {"sdpa flash", "sdpa cudnn", "cudnn fp8, quantised before", *ways}
    # What a GPU has besides is its own affair.
    assert {"sdpa flash", *ways} <= set(speeds)
    assert DEVICE.type == "cuda" or len(untimed) == 2
    alone = [speed for speed in speeds.values() if speed.parts is not None]
    assert len(alone) == len(BACKWARDS)
    assert calls == 2 * (len(speeds) - len(alone)) + 5 * len(alone)
    for speed in alone:
        assert speed.parts == dict.fromkeys(("quantise", "prepare", "forward", "dk_dv", "dq"), 2.0)
        assert (speed.forward, speed.backward) == (2.0, 6.0)
    assert (speeds["sdpa flash"].out_error or 1) < 0.005
    for backward in BACKWARDS:
        for tail in tails[::2]:
            speed = speeds[f"fp8, backward {backward}{tail}"]
            assert 0.01 < (speed.out_error or 0) < 0.07
            assert 0.01 < (speed.gradient_error or 0) < 0.1


@pytest.mark.parametrize(("kind", "untimed"), [("padded", ["sdpa cudnn", "sdpa efficient"]), ("packed", ["varlen flash"])])
def test_batches_of_other_kinds_are_attended_to_rightly(kind: str, untimed: list[str]) -> None:
    """The first sequence is half as long as the longest; a CPU has PyTorch's attention for whole batches only."""
    shape = Shape(40, 64, 2, 1, kind)
    assert shape.lengths() == [30, 40]

    def timer(call: object) -> float:
        assert callable(call)
        call()
        return 1.0

    found = list(compare(shape, timer, DEVICE, Comparison(model=sdpa)))
    assert DEVICE.type == "cuda" or [one.way for one in found if isinstance(one, Untimed)] == untimed
    model = [one.out_error for one in found if isinstance(one, Speed) and one.way == "sdpa as training calls it"]
    assert [(error or 1) < 0.005 for error in model] == [True] * (kind == "padded")
    errors = {one.way: (one.out_error, one.gradient_error) for one in found if isinstance(one, Speed)}
    for backward in BACKWARDS:
        out, gradients = errors[f"fp8, backward {backward}"]
        assert 0.01 < (out or 0) < 0.07
        assert 0.01 < (gradients or 0) < 0.1


def test_rates_are_of_the_usual_counts() -> None:
    """4 N^2 D and 10 N^2 D a head: by hand, for 2 sequences of 1000 tokens and 5 heads of 100."""
    shape = Shape(1000, 100, 2, 5)
    padded = Shape(1000, 100, 2, 5, "padded")
    assert padded.teraflops(1.0, 2) == pytest.approx(4 * (750**2 + 1000**2) * 100 * 5 / 1e-3 / 1e12)
    assert shape.teraflops(1.0, 2) == pytest.approx(4 * 1000**2 * 100 * 10 / 1e-3 / 1e12)
    assert shape.teraflops(2.0, 5) == pytest.approx(10 * 1000**2 * 100 * 10 / 2e-3 / 1e12)


def speeds(*times: tuple[int, float, float]) -> list[Speed]:
    """(tokens, milliseconds of PyTorch, of FP8)."""
    return [
        Speed(way, Shape(tokens, 64, 1, 1), time / 3, 2 * time / 3)
        for tokens, plain, eight in times
        for way, time in (("sdpa flash", plain), ("sdpa cudnn", plain + 1), ("fp8, backward mixed", eight))
    ]


@pytest.mark.parametrize(
    ("times", "found"),
    [
        ([(333, 1, 2), (1024, 2, 1), (4096, 4, 3)], 1024),
        ([(333, 2, 1), (1024, 1, 2), (4096, 4, 3)], 4096),
        ([(333, 2, 1), (4096, 3, 3)], None),
        ([(333, 2, 1), (4096, 3, 2)], 333),
    ],
)
def test_the_crossover_is_where_fp8_stays_ahead(times: list[tuple[int, float, float]], found: int | None) -> None:
    assert crossover(speeds(*times), "mixed") == found


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    curves.draw(speeds((333, 1, 2), (1024, 2, 1)), tmp_path / "speeds.png")
    assert (tmp_path / "speeds.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_claimed() -> None:
    result = runner.invoke(app, ["bench", "attention"])
    assert isinstance(result.exception, UserError)
    assert "nothing was measured" in str(result.exception)
    assert result.output == ""


def test_the_loss_is_measured_right() -> None:
    work = loss.Work(64, 50, 16, "float32", (16,))
    for chunk in (None, 16):
        cost = loss.measure(work, chunk, 1)
        assert cost.milliseconds > 0
        assert cost.difference < 1e-6


def test_bench_loss_prints_ratios() -> None:
    small = ["--rows", "64", "--columns", "50", "--hidden", "16", "--chunk", "16", "--rounds", "1"]
    result = runner.invoke(app, ["bench", "loss", *small])
    assert result.exit_code == 0, result.output
    assert "whole logits" in result.output
    assert "chunks of 16" in result.output


def test_bench_loss_refuses_other_types() -> None:
    result = runner.invoke(app, ["bench", "loss", "--dtype", "int8"])
    assert isinstance(result.exception, UserError)
