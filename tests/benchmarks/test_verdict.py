"""The law of the exit status."""

from typing import Any

import pytest

from gptface_dist.benchmarks.gpu.plan import Part, Task
from gptface_dist.benchmarks.gpu.records import Recorded
from gptface_dist.benchmarks.gpu.verdict import Result, right

BEGIN = {"kind": "begin"}
END = {"kind": "end", "how": "ended"}
OK, WRONG = {"kind": "check", "ok": True}, {"kind": "check", "ok": False}
FAILED, LEFT_OUT = {"kind": "failed", "why": "x"}, {"kind": "left out", "why": "x"}
KILLED, NOT_BEGUN = {"kind": "end", "how": "killed after its 3 s"}, {"kind": "end", "how": "left out: 0 of 5 s were left"}


def result(correctness: bool, *records: dict[str, Any], damaged: int = 0) -> Result:
    return Result(Task(Part("part", 1, "alone", correctness), ""), Recorded(list(records), damaged))


@pytest.mark.parametrize(
    ("records", "correctness", "speed"),
    [
        ([BEGIN, OK, END], [], []),
        ([BEGIN, OK, LEFT_OUT, END], [], []),
        ([BEGIN, OK, WRONG, END], ["1 of 2 checks failed"], ["1 of 2 checks failed"]),
        ([BEGIN, {"kind": "check"}, END], ["1 of 1 checks failed"], ["1 of 1 checks failed"]),
        ([BEGIN, OK, FAILED, END], ["1 could not be made"], []),
        ([BEGIN, OK, KILLED], ["killed after its 3 s"], []),
        ([BEGIN, OK], ["has no end: the command was killed, or it is still running"], []),
        ([BEGIN, END], ["checked nothing"], []),
        ([BEGIN, LEFT_OUT, END], ["checked nothing"], []),
        ([BEGIN, OK, END, NOT_BEGUN], ["left out: 0 of 5 s were left"], []),
        ([], ["nothing was recorded"], []),
    ],
)
def test_what_makes_the_status_1(records: list[dict[str, Any]], correctness: list[str], speed: list[str]) -> None:
    for named, expected in ((True, correctness), (False, speed)):
        found = result(named, *records)
        assert found.problems == expected
        assert right([result(True, BEGIN, OK, END), found]) == (not expected)


def test_in_a_dry_run_a_measurement_that_fails_is_a_fault_of_the_code() -> None:
    dry = BEGIN | {"dry": True}
    assert result(False, dry, FAILED, END).problems == ["1 could not be made"]
    assert result(False, dry, KILLED).problems == ["killed after its 3 s"]
    assert not result(False, dry, LEFT_OUT, END).problems
    assert not result(False, dry, END).problems


def test_a_record_that_cannot_be_read_may_have_been_a_failure() -> None:
    assert result(True, BEGIN, OK, END, damaged=2).problems == ["2 records cannot be read"]
    assert not result(False, BEGIN, OK, END, damaged=2).problems
