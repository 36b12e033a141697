"""`gptface bench gpu`, as a user calls it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from gptface_dist.benchmarks.gpu import records
from gptface_dist.errors import UserError
from gptface_dist.tools.main import app

ROOT = Path(__file__).resolve().parents[2]
runner = CliRunner()


def gpu(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """The command from another working folder, with the checkout on PYTHONPATH alone."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "gptface_dist.tools.main", "bench", "gpu", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False)


def test_a_dry_run_of_cheap_parts_and_what_it_leaves(tmp_path: Path) -> None:
    done = gpu("--dry", "--out", "results", "--only", "right-64-bf16,parity-zero1,ceilings,loss", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["results"]
    for name in ("right-64-bf16", "parity-zero1", "ceilings", "loss"):
        assert f"{name} began" in done.stderr
        assert f"{name} ended after" in done.stderr
        assert f"\n{name} " in done.stdout
    assert done.stdout.splitlines()[-1] == "all right: 4 checks; a dry run: no figure of it is a measurement"
    kernels = records.read(tmp_path / "results" / "parts" / "right-64-bf16.jsonl").records
    # Interpreted, not emulated: then there would be no difference at all.
    assert 0 < max(one["measured"]["from_emulator"][0] for one in kernels if one["kind"] == "check") < 0.012
    ways = [one["way"] for one in records.read(tmp_path / "results" / "parts" / "loss.jsonl").records if one["kind"] == "loss"]
    assert ways == ["whole logits", "chunks of 256"]
    assert set(json.loads((tmp_path / "results" / "gpu.json").read_text())["tasks"]) == {
        "right-64-bf16", "parity-zero1", "ceilings", "loss",
    }  # fmt: skip
    shown = gpu("--show", "--out", "results", folder=tmp_path)
    assert shown.returncode == 0
    assert shown.stdout == done.stdout
    # A check that failed counts, in whatever part it is.
    records.append(tmp_path / "results" / "parts" / "loss.jsonl", {"kind": "check", "ok": False})
    shown = gpu("--show", "--out", "results", folder=tmp_path)
    assert shown.returncode == 1
    assert shown.stdout.splitlines()[-1] == "NOT RIGHT: loss: 1 of 1 checks failed"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "speeed"], "--only speeed: no such part; the parts are right, "),
        (["--show", "--out", "nowhere"], "--show: nowhere holds no results"),
        (["--dry", "--tokens", "nowhere"], "nowhere"),
        pytest.param(
            [], "bench gpu needs a CUDA GPU: none was found, so nothing was measured; --dry ",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str) -> None:
    monkeypatch.chdir(tmp_path)
    result = runner.invoke(app, ["bench", "gpu", *arguments])
    assert isinstance(result.exception, UserError)
    assert message in str(result.exception)
    assert "\n" not in str(result.exception)
    assert list(tmp_path.iterdir()) == [], "nothing was begun"
