"""What a part can do through its context, and its parts that run other programs."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from gptface_dist.benchmarks.gpu import records, token_shards
from gptface_dist.benchmarks.gpu.context import Assignment, Context
from gptface_dist.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def context(tmp_path: Path, seconds: float = 100, checkout: Path = ROOT) -> Context:
    return Context(Assignment("", "", str(tmp_path / "part.jsonl"), seconds, True, str(checkout), None))


def recorded(tmp_path: Path) -> list[dict[str, Any]]:
    return records.read(tmp_path / "part.jsonl").records


@pytest.mark.parametrize(
    ("measured", "holds", "ok"),
    [
        ({"a": (0.1, 0.2), "b": (0.2, 0.2)}, {"c": True}, True),
        ({"a": (0.1, 0.2), "b": (0.3, 0.2)}, {}, False),
        ({"a": (float("nan"), 0.2)}, {}, False),
        ({"a": (float("inf"), 0.2)}, {}, False),
        ({}, {"c": True, "d": False}, False),
    ],
)
def test_a_check_is_ok_where_all_of_it_is(tmp_path: Path, measured: Any, holds: Any, ok: bool) -> None:
    context(tmp_path).check({"n": 1}, measured, **holds)
    assert [one["ok"] for one in recorded(tmp_path)] == [ok]


def test_a_command_that_fails_says_why_in_one_line(tmp_path: Path) -> None:
    given = context(tmp_path)
    assert given.command("version", ["--version"]) == ""
    why = given.command("bad", ["bench", "gpu", "--only", "nonsense"])
    assert why.startswith("status 2: gptface: --only nonsense: no such part")
    assert "$ gptface bench gpu --only nonsense" in (tmp_path / "part.bad.log").read_text()


def test_a_command_ends_with_its_part_s_time(tmp_path: Path) -> None:
    began = time.monotonic()
    why = context(tmp_path, seconds=4.5).command("slow", ["parity", "--zero", "0"])
    assert why.startswith("not done when the part's time was over")
    assert time.monotonic() - began < 30, "parity takes longer than its second and a half, but is not waited for"


TESTS = {
    "test_one.py": "import pytest\n\n\n@pytest.mark.parametrize('n', [1, 2, 3])\ndef test_n(n):\n    assert n != 2, 'two'\n",
    "test_other.py": "import pytest\n\ndef test_skipped():\n    pytest.skip('no')\n\ndef test_fixture(missing):\n    pass\n",
    "test_broken.py": "import no_such_module\n",
}


def test_every_kernel_test_is_a_check(tmp_path: Path) -> None:
    folder = tmp_path / "checkout" / "tests" / "kernels"
    folder.mkdir(parents=True)
    (tmp_path / "checkout" / "pyproject.toml").write_text("")
    for name, content in TESTS.items():
        (folder / name).write_text(content)
    work = tmp_path / "work"
    work.mkdir()
    module = "gptface_dist.benchmarks.gpu.parts.kernel_tests"
    # As on a GPU: a dry run would choose among the true tests by name.
    given = Assignment(module, "", str(tmp_path / "part.jsonl"), 100, False, str(tmp_path / "checkout"), None)
    command = [sys.executable, "-m", "gptface_dist.benchmarks.gpu.worker", given.dumps(), str(os.getpid())]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}
    subprocess.run(command, cwd=work, env=environment, check=True, capture_output=True, start_new_session=True)
    checks = {one["about"]["test"].rpartition("/")[2]: one for one in recorded(tmp_path)}
    assert {name: one["ok"] for name, one in checks.items()} == {
        "test_one.py::test_n[1]": True, "test_one.py::test_n[2]": False, "test_one.py::test_n[3]": True,
        "test_other.py::test_fixture": False, "test_broken.py": False, "all": True,
    }  # fmt: skip
    assert checks["test_one.py::test_n[2]"]["about"]["why"].startswith("AssertionError: two")
    assert "no_such_module" in checks["test_broken.py"]["about"]["why"]
    assert list(work.iterdir()) == []


def test_token_shards_are_checked_and_bring_their_vocabulary(tmp_path: Path) -> None:
    made = token_shards.made_up(20, tmp_path / "made")
    given = token_shards.given(made.path, tmp_path / "given")
    assert given.path == made.path
    vocabulary = json.loads((given.tokenizers / "vocabulary.json").read_text())
    assert vocabulary["text_size"] == token_shards.VOCABULARY.text_size
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError):
        token_shards.recorded_vocabulary(tmp_path / "empty")
