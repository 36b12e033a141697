"""Files of records whose writer was killed."""

import json
from pathlib import Path

import pytest

from gptface_dist.benchmarks.gpu import records


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_line_that_was_cut_costs_that_line_alone(tmp_path: Path, cut: int) -> None:
    file = tmp_path / "part.jsonl"
    records.append(file, {"kind": "check", "number": 1})
    whole = file.read_bytes()
    with file.open("ab") as opened:
        opened.write(json.dumps({"kind": "check", "text": "é" * 40}, ensure_ascii=False).encode()[:cut])
    records.append(file, {"kind": "end", "number": 2})
    assert file.read_bytes().startswith(whole)
    read = records.read(file)
    assert [one["number"] for one in read.records] == [1, 2]
    assert read.damaged == 1


def test_what_is_no_record_is_damaged(tmp_path: Path) -> None:
    file = tmp_path / "part.jsonl"
    file.write_bytes(b'{"kind": "a"}\n\n[1]\n{"no": "kind"}\n\xff\xfe\n{"kind": 3}\n{"kind": "b"}\n' + bytes(50))
    assert records.read(file) == records.Recorded([{"kind": "a"}, {"kind": "b"}], 5)
    assert records.read(tmp_path / "none.jsonl") == records.Recorded([])


def test_numbers_that_json_does_not_have_are_words(tmp_path: Path) -> None:
    file = tmp_path / "part.jsonl"
    records.append(file, {"kind": "x", "values": [float("nan"), {"y": (float("-inf"), 1.5)}], "path": Path("p")})
    assert json.loads(file.read_text(), parse_constant=pytest.fail) == {
        "kind": "x", "values": ["nan", {"y": ["-inf", 1.5]}], "path": "p",
    }  # fmt: skip
