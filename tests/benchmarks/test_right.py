"""The check of the kernels finds each kind of mistake; here a CPU computes the recipe in their place."""

import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gptface_dist.benchmarks.gpu import records
from gptface_dist.benchmarks.gpu.context import Assignment, Context
from gptface_dist.benchmarks.gpu.parts import right
from gptface_dist.benchmarks.gpu.parts.right import Case
from gptface_dist.kernels.attention.options import BACKWARDS, Sequences

CASE = Case(40, 64, "mixed", qk_norm=True)
Fault = Callable[[list[Tensor], Sequences, int], list[Tensor]]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As in a dry run: several share out a padded batch's products otherwise than a packed one's, and round otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Fault | None, case: Case = CASE) -> dict[str, Any]:
    """The record of one check where ``fault`` changes what the kernels' calls 0, 1, ... gave."""
    calls = []

    def kernels(given: Any, sequences: Sequences, *rest: Any) -> list[Tensor]:
        found = true(given, sequences, *rest)
        calls.append(sequences)
        return found if fault is None else fault(found, sequences, len(calls) - 1)

    true = right.kernels
    monkeypatch.setattr(right, "kernels", kernels)
    file = tmp_path / "right.jsonl"
    right.check(Context(Assignment("", "", str(file), 100, True, "", None)), case)
    (record,) = records.read(file).records
    return record


def off(record: dict[str, Any]) -> set[str]:
    """What a check found wrong."""
    over = {name for name, (value, limit) in record["measured"].items() if isinstance(value, str) or value > limit}
    return over | {name for name, holds in record["holds"].items() if not holds}


@pytest.mark.parametrize("case", [CASE, Case(40, 128, "fp8", specialized=True), Case(40, 64, "bf16", "channel", smooth=False)])
def test_what_is_right_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: Case) -> None:
    record = recorded(tmp_path, monkeypatch, None, case)
    assert record["ok"] is True
    assert not off(record)
    assert len(record["measured"]) == 5 + 2 * case.qk_norm + case.specialized
    assert all(record["measured"][name][0] > 0 for name in ("out", "dq", "dk", "dv")), "FP8 is not exact"


def scaled(number: int) -> Fault:
    return lambda found, _, __: [x * 1.2 if n == number else x for n, x in enumerate(found)]


def one_bit(found: list[Tensor], wrong: bool) -> list[Tensor]:
    """dk with its largest value's last bit the other way."""
    if wrong:
        bits = found[2].contiguous().view(torch.int16).flatten()
        bits[found[2].abs().argmax()] ^= 1
    return found


def leaking(found: list[Tensor], _: Sequences, call: int) -> list[Tensor]:
    """What the NaN of the poisoned call would do."""
    if call == 3:
        found[0][0, 0, 0, 0] = math.nan
    return found


@pytest.mark.parametrize(
    ("fault", "seen"),
    [
        (scaled(1), {"dq", "from_emulator"}),
        (scaled(5), {"dnorm_k", "from_emulator"}),
        (lambda found, _, call: one_bit(found, call == 2), {"same bits twice"}),
        (lambda found, sequences, _: one_bit(found, sequences.starts is not None), {"same bits packed"}),
        (leaking, {"padding has no influence"}),
        (lambda found, _, __: [x * math.nan for x in found], {*right.NAMES, "from_emulator", "finite", "same bits twice",
         "same bits packed", "padding has no influence"}),
    ],
)  # fmt: skip
def test_a_mistake_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Fault, seen: set[str]) -> None:
    record = recorded(tmp_path, monkeypatch, fault)
    assert record["ok"] is False
    assert off(record) == seen


def test_specialised_kernels_are_held_against_plain_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Call 4 is the plain kernels'."""
    case = Case(40, 64, "mixed", specialized=True)
    wrong = recorded(tmp_path, monkeypatch, lambda found, _, call: [x * 1.05 if call == 4 else x for x in found], case)
    assert off(wrong) == {"from_plain"}


def test_the_cases_cover_what_the_kernels_do() -> None:
    cases = [case for mode in ("mixed", "fp8", "bf16", "specialized") for case in right.cases(64, mode, dry=False)]
    assert {case.tokens for case in cases} == {333, 1024, 4096}
    assert {(case.backward, case.specialized) for case in cases} == set(itertools.product(BACKWARDS, (False, True)))
    for special in (False, True):
        mine = [case for case in cases if case.specialized == special]
        assert {case.inputs for case in mine} == set(right.KINDS)
        assert {case.smooth for case in mine} == {False, True}
        assert {case.qk_norm for case in mine} == ({False} if special else {False, True})
