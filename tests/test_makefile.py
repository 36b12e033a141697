"""The Makefile's recipes: every command is one, variables win, and nothing is installed where the program is named."""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from gptface_dist.config import load_config
from gptface_dist.training.config import Config
from tests.test_readme import parse

ROOT = Path(__file__).parents[1]
PROGRAM = "python3 -m gptface_dist.tools.main"

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def recipes(*words: str, **environment: str) -> str:
    """What a target would run."""
    given = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "GPTFACE", "OUT")}
    command = ["make", "-n", "--no-print-directory", *words]
    return subprocess.run(
        command, cwd=ROOT, env={**given, **environment}, capture_output=True, text=True, check=True
    ).stdout.replace("\\\n", " ")


def commands(text: str, program: str = PROGRAM) -> list[list[str]]:
    """Arguments of every command of the program."""
    found = []
    for line in text.splitlines():
        if (at := line.find(f"{program} ")) >= 0:
            words = shlex.split(line[at + len(program) :])
            end = next((i for i, word in enumerate(words) if word in (">", ";", "}")), len(words))
            found.append([word.rstrip(";") for word in words[:end]])
    return found


@pytest.mark.parametrize("target", ["quickstart", "quickstart-gpu", "study", "gpu-study", "gpu-bundle"])
def test_every_command_is_one(target: str) -> None:
    text = recipes(target, f"GPTFACE={PROGRAM}")
    found = commands(text)
    assert len(found) >= 9
    for arguments in found:
        parse(arguments)
    assert "pip" not in text
    assert "venv" not in text


def test_users_get_the_installed_program() -> None:
    text = recipes("quickstart")
    assert len(commands(text, ".venv/bin/gptface")) >= 13
    assert "tools.main" not in text


def test_the_gpu_does_what_it_can_and_variables_win() -> None:
    found = commands(recipes("gpu-study", f"GPTFACE={PROGRAM}", OUT="elsewhere"))
    by_name = {" ".join(arguments[:2]): arguments for arguments in found}
    tokenize = by_name["data tokenize"]
    assert tokenize[tokenize.index("--device") + 1] == "cuda"
    assert not any("elsewhere" in word for arguments in found for word in arguments), "OUT of the environment is another's"
    assert sum("out-gpu-study" in " ".join(arguments) for arguments in found) == len(found)
    small = commands(recipes("gpu-study", f"GPTFACE={PROGRAM}", "COUNT=64", "DEVICE=cpu", "OUT=small", "STEPS=5"))
    text = " ".join(word for arguments in small for word in arguments)
    for wanted in ("render small/faces --count 64 ", "--device cpu", "run.steps=5", "study small/release"):
        assert wanted in text
    assert "cuda" not in text


@pytest.mark.parametrize("target", ["quickstart", "quickstart-gpu", "gpu-study", "study"])
def test_runs_have_configurations_that_load(target: str) -> None:
    (train,) = (one for one in commands(recipes(target, f"GPTFACE={PROGRAM}")) if one[0] == "train")
    config = load_config(Config, ROOT / train[1], train[2:])
    assert config.run.folder.startswith("out")
    assert config.evaluation.sources
    if target == "gpu-study":
        assert (config.engine.dtype, config.tracking.mlflow, config.layout.world) == ("bfloat16", False, 1)
