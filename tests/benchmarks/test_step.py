"""`gptface bench train`: all systems do the same work, and what is said about their times is right."""

import math
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from gptface_dist.benchmarks import step
from gptface_dist.benchmarks.step import OURS, PIPELINE, PYTORCH, TOLERANCE, WARM_UP, System, agree, difference, timings
from gptface_dist.benchmarks.workload import Workload
from gptface_dist.errors import UserError
from gptface_dist.model.options import ModelOptions
from gptface_dist.model.parameters import initialise
from gptface_dist.model.plain import GPTFace
from gptface_dist.parallel.layout import Layout
from gptface_dist.tools.main import app

MODEL = ModelOptions(layers=2, hidden=16, heads=2, ffn=24, text_positions=16, rows=4, columns=4, init_std=0.3)
WORK = Workload(MODEL, micro_batches=4, size=2, text_length=8, grid=4, text_ids=43, image_codes=24)


def plain_loss(work: Workload, step: int) -> float:
    """The mean losses of a global batch, with the plain model's initial weights."""
    model = GPTFace(work.model, work.vocabulary)
    initialise(model, work.seed)
    totals = [0.0, 0.0, 0.0], [0, 0, 0]
    for batch in work.batches(step):
        with torch.no_grad():
            features = model(batch.tokens, batch.segments, batch.positions, batch.lengths)
            for i, each in enumerate(work.objective.losses(features, batch, model, {})):
                totals[0][i] += float(each.loss)
                totals[1][i] += each.items
    return sum(loss / items for loss, items in zip(*totals, strict=True))


def test_all_ways_find_the_loss_of_the_plain_model_and_make_the_same_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    told: list[str] = []
    found = step.compare(WORK, processes=2, rounds=1, steps=1, progress=told.append)
    assert list(found.losses) == [str(way) for way in step.systems(2)]
    for way, losses in found.losses.items():
        assert losses[0] == pytest.approx(plain_loss(WORK, 0), rel=1e-6), way
        # The second step's loss is that of updated weights, and far from what it would be without.
        assert losses[1] == pytest.approx(found.losses[f"{PYTORCH} DP2"][1], rel=1e-5), way
        assert abs(losses[1] / plain_loss(WORK, 1) - 1) > 10 * TOLERANCE["float32"], way
    assert all(len(timing.seconds) == 1 and timing.seconds[0] > 0 for timing in found.timings)
    assert [timing.way for timing in found.timings] == list(found.losses)
    assert len(told) == step.parts(2, rounds=1)
    assert not any(tmp_path.iterdir()), "DeepSpeed compiled what it does not use, for a minute"


def test_ratios_are_the_baselines_time_over_ones_own_of_the_same_round() -> None:
    slow, fast = System(PIPELINE, Layout(pp=2, zero=1)), System(OURS, Layout(pp=2, zero=1))
    first, second = timings({slow: [2.0, 3.0], fast: [1.0, 6.0]}, {slow: slow, fast: slow})
    assert (first.way, first.baseline, first.ratios) == (f"{PIPELINE} PP2 ZeRO-1", f"{PIPELINE} PP2 ZeRO-1", [1.0, 1.0])
    assert (second.way, second.baseline, second.ratios) == (f"{OURS} PP2 ZeRO-1", f"{PIPELINE} PP2 ZeRO-1", [2.0, 0.5])


def test_each_way_is_compared_with_the_baseline_of_its_kind() -> None:
    for processes in (2, 4):
        plan = step.systems(processes)
        assert all(way.layout.world == processes for way in plan)
        assert {(way.layout.pp, baseline.system) for way, baseline in plan.items()} == {(2, PIPELINE), (1, PYTORCH)}
        assert [way.layout.zero for way in plan if way.system == OURS] == [1, 3, 0, 1]
    assert [str(way) for way in step.systems(1)] == ["PyTorch", OURS, f"{OURS} ZeRO-1"]


def test_different_losses_are_found() -> None:
    assert difference({"a": [1.0, 2.0], "b": [1.0, 2.0], "c": [1.0, 2.2]}) == pytest.approx(0.2 / 2.2)
    assert agree({"a": [1.0, 2.0], "b": [1.00001, 2.0]}, "float32")
    assert not agree({"a": [1.0, 2.0], "b": [1.001, 2.0]}, "float32")
    assert agree({"a": [1.0, 2.0], "b": [1.001, 2.0]}, "bfloat16")
    nan = {"a": [1.0, math.nan], "b": [1.0, 2.0], "c": [1.0, 2.0]}
    assert math.isnan(difference(nan))
    assert not agree(nan, "bfloat16")


def test_batches_have_one_shape_and_differ() -> None:
    batches = [batch for step in range(WARM_UP) for batch in WORK.batches(step)]
    assert {tuple(batch.tokens.shape) for batch in batches} == {(2, 32)}
    assert len({tuple(batch.tokens.flatten().tolist()) for batch in batches}) == len(batches)
    assert len({int(length) for batch in batches for length in batch.lengths}) > 1, "there is padding"
    again = WORK.batches(1)[0]
    assert torch.equal(again.tokens, batches[WORK.micro_batches].tokens)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--processes", "3"], "even number of processes, got 3"),
        (["--micro-batches", "3"], "3 micro-batches cannot be divided among 2 replicas"),
        (["--grid", "5"], "positions for 4x4 codes: a grid of 5 is too large"),
        (["--text-length", "14"], "positions for captions of 13 tokens: 14 are too many"),
        (["--size", "0"], "size must be at least 1, got 0"),
        (["--dtype", "float16"], "float32, bfloat16, got 'float16'"),
    ],
)
def test_mistakes_are_refused_before_any_process_starts(tmp_path: Path, options: list[str], message: str) -> None:
    path = tmp_path / "model.yaml"
    path.write_text("layers: 2\nhidden: 16\nheads: 2\nffn: 24\ntext_positions: 16\nrows: 4\ncolumns: 4\n")
    small = ["--micro-batches", "4", "--text-length", "8", "--grid", "4"]
    result = CliRunner().invoke(app, ["bench", "train", "--model", str(path), *small, *options])
    assert isinstance(result.exception, UserError), result.output
    assert message in str(result.exception)


@pytest.mark.parametrize(("line", "message"), [("layers: 3", "3 layers cannot be divided"), ("hidden_dropout: 0.1", "dropout")])
def test_models_that_cannot_be_compared_are_refused(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "model.yaml"
    path.write_text(f"{line}\nhidden: 16\nheads: 2\nffn: 24\n")
    result = CliRunner().invoke(app, ["bench", "train", "--model", str(path)])
    assert isinstance(result.exception, UserError), result.output
    assert message in str(result.exception)
