"""Comparing and drawing runs by their metrics."""

import json
import math
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from gptface_dist.errors import UserError
from gptface_dist.tools.main import app
from gptface_dist.training.analysis import curves
from gptface_dist.training.metrics import NAME


def write(folder: Path, losses: list[float], torn: bool = False) -> Path:
    folder.mkdir()
    lines = []
    for step, loss in enumerate(losses, 1):
        parts = {"loss": loss, "loss/text": loss, "loss/image": loss / 2}
        lines.append(json.dumps({"step": step, "kind": "train", **parts}))
    lines.append(json.dumps({"step": len(losses), "kind": "evaluation", "loss/text": 2.0, "constant_guess/text": 3.0}))
    (folder / NAME).write_text("\n".join(lines) + "\n" + ('{"step": 99' if torn else ""))
    return folder


def test_the_difference_is_the_largest_of_common_steps(tmp_path: Path) -> None:
    one, two = write(tmp_path / "one", [4.0, 2.0, 1.0]), write(tmp_path / "two", [4.0, 2.2])
    steps, found = curves.difference(one, two)
    assert steps == 2
    assert found == pytest.approx({"loss": 0.1, "loss/text": 0.1, "loss/image": 0.1})


def test_a_loss_of_zero_divides_nothing(tmp_path: Path) -> None:
    """A term that is solved, or of weight 0 (by hand: 0 of equal ones, infinite where only the first is 0)."""
    one, two = write(tmp_path / "one", [4.0, 0.0]), write(tmp_path / "two", [4.0, 1.0])
    assert curves.difference(one, one)[1]["loss"] == 0.0
    assert curves.difference(one, two)[1]["loss"] == math.inf


@pytest.mark.parametrize("step", range(3))
def test_nan_is_a_difference_wherever_it_stands(tmp_path: Path, step: int) -> None:
    losses = [4.0, 2.0, 1.0]
    one = write(tmp_path / "one", losses)
    losses[step] = math.nan
    two = write(tmp_path / "two", losses)
    assert math.isnan(curves.difference(one, two)[1]["loss"])
    for first, second in ((one, two), (two, one), (two, two)):
        out = str(tmp_path / "curves.png")
        done = CliRunner().invoke(app, ["curves", str(first), str(second), "--out", out, "--within", "1"])
        assert done.exit_code == 1
        assert "nan" in done.output


def test_a_line_that_was_being_written_is_passed_over(tmp_path: Path) -> None:
    one = write(tmp_path / "one", [4.0, 2.0], torn=True)
    assert curves.difference(one, one) == (2, {"loss": 0, "loss/text": 0, "loss/image": 0})


def test_draws_a_picture(tmp_path: Path) -> None:
    runs = [write(tmp_path / "one", [4.0, 2.0, 1.0]), write(tmp_path / "two", [4.0, 2.2])]
    curves.draw(runs, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.width == pytest.approx(2 * 5 * 110, abs=5)
        assert len(picture.convert("RGB").getcolors(10**6) or []) > 20


def test_a_folder_without_metrics_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"metrics\.jsonl"):
        curves.difference(tmp_path, tmp_path)
