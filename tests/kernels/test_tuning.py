"""The tuner: what it tries, in which order, what it believes, and what it writes."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gptface_dist.kernels.attention import tuning
from gptface_dist.kernels.attention.kernel_set import KernelSet
from gptface_dist.kernels.attention.launch import DK_DV, DQ, FORWARD, Key, Launch, candidates, keys, load_table
from gptface_dist.kernels.attention.shapes import Shape
from gptface_dist.kernels.attention.tuning import Trial, best, tune, tuned_keys, written

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KEY = Key(DQ, 64, "mixed", False)


def once(call: object) -> float:
    assert callable(call)
    call()
    return 1.0


def small(tokens: int, size: int) -> Shape:
    return Shape(tokens, size, 2, 1, "padded")


def test_candidates_are_tried_and_right() -> None:
    """All of a kernel's at the first length, the fastest at the second, each beside the table's own, which comes first."""
    key = Key(DK_DV, 64, "mixed", False)
    found = list(tune([key], load_table(), once, DEVICE, lambda: 1.0, (70, 40), small))
    own = load_table().launches[key]
    first = [trial for trial in found if trial.shape.tokens == 70]
    assert first[0].launch == own
    assert {trial.launch for trial in first} == {own, *candidates(key)}
    assert all(trial.right and trial.milliseconds == 1.0 for trial in found)
    second = [trial for trial in found if trial.shape.tokens == 40]
    assert second[0].launch == own
    assert 0 < len(second) <= 1 + tuning.SHORTLIST


def test_time_that_is_up_ends_it() -> None:
    seconds = iter([3.0, 2.0, 1.0, 0.0, -1.0])
    found = list(tune([KEY, KEY], load_table(), once, DEVICE, lambda: next(seconds), (40,), small))
    assert len(found) == 2


def test_a_launch_that_fails_or_differs_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    call = KernelSet.call

    def broken(kernels: KernelSet, kernel: str, launch: Launch):  # type: ignore[no-untyped-def]
        if launch.keys == 32:
            raise RuntimeError("out of resource: shared memory\nmore")
        right = call(kernels, kernel, launch)
        return (lambda: [x * 1.1 for x in right()]) if launch.queries == 64 else right

    monkeypatch.setattr(KernelSet, "call", broken)
    found = list(tune([KEY], load_table(), once, DEVICE, lambda: 1.0, (40,), small))
    failed = [trial for trial in found if trial.launch.keys == 32]
    assert {trial.failure for trial in failed} == {"RuntimeError: out of resource: shared memory"}
    for trial in found:
        assert trial.right == (trial.launch.keys != 32 and trial.launch.queries == 128)
    chosen = best([replace(trial, milliseconds=1.0 if trial.right else 0.1) for trial in found], load_table(), "GPU").launches[
        KEY
    ]
    assert (chosen.queries, chosen.keys == 32) == (128, False)


def test_the_best_is_fastest_over_all_lengths() -> None:
    table = load_table()
    own, fast, lopsided, half = table.launches[KEY], Launch(64, 64, 4), Launch(64, 128, 4), Launch(128, 128)
    long, short = Shape.usual(4096, 64), Shape.usual(1024, 64)
    trials = [
        Trial(KEY, launch, shape, milliseconds, 0.001)
        for launch, times in ((own, (4.0, 1.0)), (fast, (3.0, 0.8)), (lopsided, (2.0, 1.9)), (half, (1.0, None)))
        for shape, milliseconds in zip((long, short), times, strict=True)
        if milliseconds is not None
    ]
    found = best(trials, table, "NVIDIA H200")
    assert found.launches[KEY] == fast
    assert {key: x for key, x in found.launches.items() if key != KEY} == {
        key: x for key, x in table.launches.items() if key != KEY
    }
    assert found.device == "NVIDIA H200"
    assert found.date
    wrong = [replace(trial, difference=math.nan) if trial.launch == fast else trial for trial in trials]
    assert best(wrong, table, "NVIDIA H200").launches[KEY] == own


def test_the_table_is_written_after_each_kernel_and_not_without_a_trial(tmp_path: Path) -> None:
    table, other, path = load_table(), Key(DQ, 128, "mixed", False), tmp_path / "launches.json"
    shape = Shape.usual(1024, 64)
    assert list(written([], table, "GPU", path)) == []
    assert not path.exists()
    fast = Launch(64, 64, 4)
    trials = [Trial(KEY, launch, shape, time, 0.001) for launch, time in ((table.launches[KEY], 2.0), (fast, 1.0))]
    coming = written([*trials, Trial(other, table.launches[other], shape, 1.0, 0.0)], table, "GPU", path)
    next(coming), next(coming)
    assert not path.exists()
    next(coming)
    assert load_table(str(path)).launches == table.launches | {KEY: fast}
    assert list(coming) == []


def test_every_key_is_tuned_once_and_valuable_ones_first() -> None:
    found = tuned_keys(("mixed", "fp8", "bf16"))
    assert sorted(map(str, found)) == sorted(map(str, keys()))
    assert found[:3] == [Key(FORWARD, 128, "any", False), Key(DK_DV, 128, "mixed", False), Key(DQ, 128, "mixed", False)]


def test_the_tables_own_launches_are_candidates() -> None:
    for key, launch in load_table().launches.items():
        assert launch in candidates(key)
