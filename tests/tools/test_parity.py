"""`gptface parity`, as a user calls it."""

import os
import sys

import pytest
from typer.testing import CliRunner

from gptface_dist.errors import UserError
from gptface_dist.tools.main import app
from tests.sockets import run_and_watch

runner = CliRunner()


def test_one_process_without_zero_equals_the_plain_model() -> None:
    result = runner.invoke(app, ["parity", "--zero", "0", "--steps", "1", "--dropout", "0.1", "--recompute", "layer"])
    assert result.exit_code == 0, result.output
    assert "equal within 1e-05" in result.output


def test_replicas_that_do_not_divide_eight_compare_every_micro_batch() -> None:
    """Nine of two samples: three for each replica. And all processes listen on loopback alone."""
    arguments = ["parity", "--dp", "3", "--zero", "0", "--steps", "1"]
    command = [sys.executable, "-m", "gptface_dist.tools.main", *arguments]
    done, seen = run_and_watch(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert "equal within 1e-05" in done.stdout
    assert seen == {"127.0.0.1"}


def test_a_difference_is_a_status() -> None:
    result = runner.invoke(app, ["parity", "--zero", "0", "--steps", "1", "--dtype", "bfloat16", "--tolerance", "1e-6"])
    assert result.exit_code == 1
    assert "DIFFERENT within 1e-06" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dp", "3", "--micro-batches", "8"], "8 micro-batches cannot be shared by 3 replicas"),
        (["--micro-batches", "3"], "--micro-batches 3 does not divide the 16 samples"),
        (["--tp", "3"], "model.heads 4 is not a multiple of tp 3"),
        (["--zero", "4"], r"zero must be one of \(0, 1, 2, 3\), got 4"),
        (["--dtype", "float16"], "engine.dtype must be one of float32, bfloat16, got 'float16'"),
        (["--recompute", "all"], "engine.recompute must be one of none, attention, layer"),
        (["--dropout", "1"], "model.hidden_dropout must be at least 0 and below 1"),
    ],
)
def test_mistakes_are_refused(arguments: list[str], message: str) -> None:
    result = runner.invoke(app, ["parity", *arguments])
    assert isinstance(result.exception, UserError)
    with pytest.raises(UserError, match=message):
        raise result.exception
