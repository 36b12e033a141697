"""`gptface data` as a user runs it: lines on stdout, exit statuses, mistakes in one line."""

from pathlib import Path

import pytest

from tests.picture_shards import write_pictures
from tests.program import gptface


def test_index_then_verify_then_damage(tmp_path: Path) -> None:
    write_pictures(tmp_path, [2, 3])
    (tmp_path / "index.json").unlink()
    status, out, error = gptface("data", "verify", tmp_path)
    assert (status, error) == (0, "")
    assert out.startswith("2 shards, 5 samples, ")
    assert out.endswith("problems: 0; no index.json: nothing to compare with\n")
    status, out, error = gptface("data", "index", tmp_path, "--workers", "1")
    assert (status, error) == (0, "")
    assert out.startswith("2 shards (2 indexed before), 5 samples, ")
    path = tmp_path / "00001.tar"
    data = bytearray(path.read_bytes())
    data[data.index(b"000000003.txt")] ^= 1
    path.write_bytes(data)
    status, out, error = gptface("data", "verify", tmp_path)
    assert (status, error) == (1, "")
    *lines, summary = out.splitlines()
    assert all(line.startswith("00001.tar\t") and line.count("\t") == 2 for line in lines)
    assert summary.endswith(f"problems: {len(lines)}")
    status, out, error = gptface("data", "index", tmp_path, "--force")
    assert (status, error) == (1, "")
    first, summary = out.splitlines()
    assert first.startswith("00001.tar: bytes ")
    assert "5 samples" in summary
    assert (tmp_path / "index.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["index", "nowhere"], "no folder nowhere"),
        (["index", "http://127.0.0.1:9/{0..1}.tar"], "name a folder for its index"),
        (["verify", "nowhere"], "no folder nowhere"),
        (["verify", ".", "--tokenizers", "nowhere"], "does not exist: make it with"),
        (["tokenize", "nowhere", "out", "--tokenizers", "x", "--size", "8"], "no folder nowhere"),
        (["tokenize", "nowhere", "out", "--tokenizers", "x", "--size", "8", "--batch", "0"], "at least 1 picture"),
    ],
)
def test_mistakes_are_one_line_and_status_2(arguments: list[str], message: str) -> None:
    status, out, error = gptface("data", *arguments)
    assert (status, out) == (2, "")
    assert message in error
    assert error.count("\n") == 1
