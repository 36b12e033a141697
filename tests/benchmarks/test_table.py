"""What a reader sees of the records, however many and however damaged they are."""

from typing import Any

import pytest

from gptface_dist.benchmarks.gpu.plan import Part, Task
from gptface_dist.benchmarks.gpu.records import Recorded
from gptface_dist.benchmarks.gpu.table import MOST, table
from gptface_dist.benchmarks.gpu.verdict import Result

ORIGIN = {"device": "H100", "dry": False, "commit": "abc", "versions": {"torch": "9"}}
H100 = {"kind": "begin", "date": "2030-01-02 03:04:05", **ORIGIN}
END = {"kind": "end", "at": 61.2, "how": "ended"}


def check(error: Any, limit: float = 0.2, **about: Any) -> dict[str, Any]:
    ok = not isinstance(error, str) and error <= limit
    return {"kind": "check", "ok": ok, "about": about, "measured": {"error": [error, limit]}, "holds": {"same bits": ok}}


def result(
    name: str, *records: dict[str, Any], begin: dict[str, Any] = H100, correctness: bool = True, damaged: int = 0
) -> Result:
    return Result(Task(Part(name, 1, "alone", correctness), ""), Recorded([begin, *records], damaged))


def line(text: str, start: str) -> str:
    (found,) = (line for line in text.splitlines() if line.startswith(start))
    return found


def test_parts_stand_with_their_end_checks_date_and_device() -> None:
    text = table([result("right", check(0.1), check(0.05), END), result("train", check(0.1), damaged=1)])
    assert line(text, "commit") == "commit abc; torch 9"
    assert " ".join(line(text, "right").split()) == "right ended 61 s 2/2 ok 2030-01-02 03:04 H100 error 0.1<0.2"
    assert "no end recorded" in line(text, "train")
    assert "1/1 ok, 1 unreadable" in line(text, "train")
    assert text.splitlines()[-1].startswith("NOT RIGHT: train: has no end")


def test_what_is_wrong_is_named() -> None:
    failed = {"kind": "failed", "about": {"tokens": 333}, "why": "ValueError: no"}
    text = table([result("right", check(0.3, tokens=40, smooth=True, special=False), check("nan", inputs="sink"), failed, END)])
    assert line(text, "right: tokens 40") == "right: tokens 40 smooth: error 0.3 > 0.2, not: same bits"
    assert line(text, "right: sink") == "right: sink: error nan > 0.2, not: same bits"
    assert line(text, "right: tokens 333") == "right: tokens 333: ValueError: no"
    assert text.splitlines()[-1] == "NOT RIGHT: right: 2 of 2 checks failed, 1 could not be made"


def test_measurements_are_rows_and_what_they_share_is_said_once() -> None:
    rows = [{"kind": "step", "at": n, "model": "1b", "way": f"w{n}", "ms": 1234.56 * n, "loss": None} for n in (1, 2)]
    text = table([result("step", *rows, END, correctness=False)])
    assert text.split("== ")[1].splitlines()[:3] == ["step: model 1b", "way  ms", "w1   1235"]
    assert text.splitlines()[-1] == "nothing was checked"


def test_figures_of_two_devices_are_not_mixed_unseen() -> None:
    other = H100 | {"device": "H200", "date": "2030-05-06 07:08:09"}
    text = table([result("right", check(0.1), END), result("loss", END, begin=other, correctness=False)])
    assert "of 2 devices: do not compare" in text
    assert "2030-05-06 07:08  H200" in line(text, "loss")
    assert "of 2 devices" not in table([result("right", check(0.1), END), result("loss", END)])
    dry = table([result("right", check(0.1), END, begin=H100 | {"device": "2-core CPU", "dry": True})])
    assert "2-core CPU, dry run" in dry
    assert dry.splitlines()[-1] == "all right: 1 checks; a dry run: no figure of it is a measurement"


def test_the_verdict_is_of_what_was_asked_for() -> None:
    good, bad = result("right", check(0.1), END), result("train", check(0.3), END)
    *_, earlier, verdict = table([good, bad], [good]).splitlines()
    assert earlier == "from an earlier call: train: 1 of 1 checks failed"
    assert verdict == "all right: 1 checks"
    assert table([good, bad], [bad]).splitlines()[-1] == "NOT RIGHT: train: 1 of 1 checks failed"


@pytest.mark.parametrize("records", [10, 100, 5000])
@pytest.mark.parametrize("parts", [1, 12, 200])
def test_it_fits_whatever_there_is(records: int, parts: int) -> None:
    many = [check(0.3, tokens=n, what="x" * 300) for n in range(records // parts + 1)]
    many += [{"kind": kind, "about": {}, "why": "y" * 300} for kind in ("failed", "left out") for _ in range(records // parts)]
    many += [{"kind": f"speed {n % 5}", "ms": n, "way": f"w{n}" * 20} for n in range(records // parts + 5)]
    text = table([result(f"part{n}", *many, END) for n in range(parts)])
    assert len(text) <= MOST
    assert text.splitlines()[-1].startswith("NOT RIGHT: part0: ")
    assert "more in gpu.json" in text or records == 10 or parts == 200


def test_records_of_another_form_are_shown_as_they_are() -> None:
    odd = [{"kind": "check"}, {"kind": "end"}, {"kind": "x", "value": {"a": 1}}, {"kind": "failed"}]
    assert "NOT RIGHT" in table([result("right", *odd, begin={"kind": "begin"})])
