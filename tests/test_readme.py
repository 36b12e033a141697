"""The README's way from nothing to pictures works as it is written, and no document names a command or option that is none."""

import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from PIL import Image

from gptface_dist.config import load_config, override
from gptface_dist.errors import UserError
from gptface_dist.generation.options import GenerationOptions
from gptface_dist.tools import main
from gptface_dist.training.config import Config
from tests.program import gptface

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAM = ("gptface", "gptface_dist.tools.main")
"""How a command line names the program; `python -m` and torchrun take the module."""
# Some versions of typer use click, others have one of their own inside; this exception is public in all.
UsageError: type[typer.BadParameter] = typer.BadParameter.__mro__[1]
SMALLER = {"--count": "96", "--steps": "2", "--workers": "1"}
"""Option -> value that makes a command of the README quick."""
QUICK = {
    ("tokenizer", "image"): ["--held-out", "16"],
    ("train",): ["run.steps=3", "schedule.warmup_steps=1", "evaluation.batches=1", "tracking.mlflow=false"],
}
"""What is added to commands for the same reason."""


def commands(document: Path) -> Iterator[list[str]]:
    """Arguments of every command of the program in a document's indented blocks."""
    text = document.read_text(encoding="utf-8").replace("\\\n", " ")
    for line in text.splitlines():
        if line.startswith("    ") and any(f"{name} " in line for name in PROGRAM):
            words = shlex.split(line, comments=True)
            first = next((number for number, word in enumerate(words) if word in PROGRAM), None)
            if first is not None:
                yield words[first + 1 :]


def parse(arguments: list[str]) -> None:
    """Let the parsers of the program and of generation's options read the arguments; nothing runs. UsageError or UserError."""
    command: Any = typer.main.get_command(main.app)
    while hasattr(command, "commands"):
        name, *arguments = arguments
        if name not in command.commands:
            raise UsageError(f"no command {name}")
        command = command.commands[name]
    context = command.make_context(command.name, arguments)
    if command.name in ("generate", "edit", "caption"):
        override(GenerationOptions(), list(context.params["overrides"] or []))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_is_one(document: Path) -> None:
    for arguments in commands(document):
        try:
            parse(arguments)
        except (UsageError, UserError) as error:
            pytest.fail(f"gptface {shlex.join(arguments)}: {error}")


def test_commands_are_found_and_wrong_ones_refused() -> None:
    found = list(commands(ROOT / "README.md"))
    assert len(found) > 15
    assert {"render", "train", "edit", "parity"} <= {word for arguments in found for word in arguments[:2]}
    for wrong in (["generate", "r", "o.png", "--texts", "a"], ["faces", "draw"], ["data", "tokenize", "a"]):
        with pytest.raises(UsageError):
            parse(wrong)
    with pytest.raises(UserError, match="'rerank=4'"):
        parse(["generate", "r", "o.png", "--text", "a", "rerank=4"])


def test_the_cluster_s_overrides_exist() -> None:
    (arguments,) = (one for one in commands(ROOT / "README.md") if "configs/mine.yaml" in one)
    overrides = [f"model={ROOT / one.removeprefix('model=')}" if one.startswith("model=") else one for one in arguments[2:]]
    config = load_config(Config, ROOT / "configs" / "quickstart.yaml", overrides)
    assert config.layout.world == 4 * 8, "srun -N4 --ntasks-per-node=8"
    config.layout.check(4 * 8, config.model, config.data.global_batch // config.data.micro_batch // config.layout.dp)


def test_from_nothing_to_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All commands from the first `faces render` to the last on a release, in their order, with fewer faces and steps."""
    every = list(commands(ROOT / "README.md"))
    first = next(number for number, one in enumerate(every) if one[:2] == ["faces", "render"])
    last = next(number for number, one in enumerate(every) if one[0] == "score")
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    done = []
    for arguments in every[first : last + 1]:
        if "FOLDER" in arguments:
            arguments = [word.replace("FOLDER", "out/held_out") for word in arguments]
        quick = [SMALLER.get(before, word) for before, word in zip(["", *arguments], arguments, strict=False)]
        quick += next((more for name, more in QUICK.items() if tuple(arguments[: len(name)]) == name), [])
        status, _, error = gptface(*quick)
        assert status == 0, (quick, error)
        done.append(arguments[0])
    assert {"tokenizer", "data", "train", "convert", "inspect", "generate", "edit", "caption", "score"} < set(done)
    with Image.open("edited.png") as opened:
        assert opened.size == (32, 32)
