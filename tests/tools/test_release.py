"""`gptface convert` and `gptface inspect` as a user runs them."""

import subprocess
import sys
from pathlib import Path

import pytest

from gptface_dist import release
from gptface_dist.tokenizers.vocabulary import Vocabulary
from tests.program import gptface
from tests.release.factories import make_checkpoint, make_model, make_tokenizers


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal in which no table breaks its lines."""
    monkeypatch.setenv("COLUMNS", "160")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    (folder / "tokenizers").mkdir()
    vocabulary: Vocabulary = make_tokenizers(folder / "tokenizers")
    make_checkpoint(folder / "run", make_model(vocabulary), folder / "tokenizers")
    # What `make quickstart` leaves where its commands, and tests, are called.
    (folder / "out").symlink_to(folder)
    return folder / "run"


def test_convert_inspect_damage(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "release"
    status, told, error = gptface("convert", run, out, "--dtype", "bf16", "--name", "Ours", "--license", "mit")
    assert (status, error) == (0, "")
    assert "distributed and plain model: logits agree to" in told
    assert "float32 and bfloat16: logits agree to" in told
    found = release.load(out)
    assert (found.config.dtype, found.config.card.name, found.config.card.license) == ("bfloat16", "Ours", "mit")

    status, told, error = gptface("inspect", out, "--verify")
    assert (status, error) == (0, "")
    assert told.startswith(f"release {out}\n")
    assert told.endswith("every file is what was written\n")
    lines = [" ".join(line.split()) for line in told.splitlines()]
    assert "layers.0-1.qkv.weight 2 48 x 16 bfloat16 1,536" in lines
    assert "Steps 200" in lines
    assert "Layout DP2 x TP2 x PP1 x ZeRO-3" in lines
    assert f"Text tokenizer sha256 {found.vocabulary.text_sha256}" in lines

    status, told, error = gptface("convert", run, out)
    assert (status, told, error) == (2, "", f"gptface: {out} exists: remove it or give another name\n")

    path = out / "README.md"
    path.write_text(path.read_text() + "edited")
    (out / "reference.safetensors").unlink()
    status, told, error = gptface("inspect", out, "--verify")
    assert (status, error) == (1, "")
    assert f"{out / 'reference.safetensors'} is missing" in told
    assert f"{path} has" in told
    assert told.endswith("problems: 2\n")


def test_inspect_a_run_and_its_checkpoint(run: Path) -> None:
    folder = run / "checkpoints" / "step-00000200"
    status, told, error = gptface("inspect", run)
    assert (status, error) == (0, "")
    assert told.startswith(f"checkpoint {folder}\n")
    lines = [" ".join(line.split()) for line in told.splitlines()]
    assert "layers.0-1.qkv.weight 2 48 x 16 float32 1,536" in lines
    assert any(line.startswith("Holds exp_avg (") for line in lines)
    status, told, _ = gptface("inspect", folder, "--tensors", "--verify")
    assert status == 0
    assert told.endswith("every file is what was written\n")
    assert len([line for line in told.splitlines() if "exp_avg_sq/layers.1.qkv.weight" in line]) == 1


def test_a_process_of_its_own_says_nothing_more(run: Path, tmp_path: Path) -> None:
    """Libraries warn on import, which happens once a process."""
    command = [sys.executable, "-m", "gptface_dist.tools.main", "convert", str(run), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={"PATH": ""})
    assert (done.returncode, done.stderr) == (0, "")
    assert "logits agree to" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "nowhere"], "nowhere is neither a release (config.json) nor a checkpoint (run.json) nor a run"),
        (["convert", "nowhere", "{out}"], "nowhere holds no checkpoint: give the folder of a checkpoint or of a run"),
        (["convert", "{run}", "{out}", "--dtype", "fp8"], "a release is one of float32, bfloat16, not 'fp8'"),
        (["convert", "{run}", "{out}", "--ema"], "holds no running average: convert without --ema"),
        (["convert", "{run}", "{out}", "--tokenizers", "{run}"], "vocabulary.json does not exist"),
    ],
)
def test_mistakes_end_in_one_line(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    """Beside an ``out/`` of a finished quickstart, which has nothing to do with it."""
    monkeypatch.chdir(run.parent)
    out = tmp_path / "out"
    status, told, error = gptface(*(argument.format(run=run, out=out) for argument in arguments))
    assert (status, told) == (2, "")
    assert error.startswith("gptface: ")
    assert error.count("\n") == 1
    assert message in error
    assert not out.exists()
