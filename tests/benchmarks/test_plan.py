"""The table of parts, and what --only makes of it."""

import importlib
from collections.abc import Iterator

import pytest

from gptface_dist.benchmarks.gpu import plan
from gptface_dist.errors import UserError
from gptface_dist.kernels.attention.options import BACKWARDS, HEAD_SIZES


def names(*only: str, dry: bool = False) -> list[str]:
    return [task.name for task in plan.tasks(only, dry)]


def test_correctness_comes_first_and_every_part_has_its_file() -> None:
    # Before them, only what runs beside them.
    timed = [part.stage == plan.ALONE for part in plan.PARTS]
    assert timed == sorted(timed)
    assert [part.name for part in plan.PARTS if part.correctness] == ["right", "parity", "train", "kernel_tests"]
    assert not any(part.correctness for part in plan.PARTS if part.stage == plan.ALONE)
    for part in plan.PARTS:
        assert callable(importlib.import_module(f"{part.package}.{part.name}").run)
        assert set(part.dry_variants or ()) <= set(part.variants)


def test_every_kernel_is_checked() -> None:
    (right,) = (part for part in plan.PARTS if part.name == "right")
    assert set(right.variants) == {f"{size}-{mode}" for size in HEAD_SIZES for mode in (*BACKWARDS, plan.SPECIALIZED)}


def test_only_names_parts_and_tasks() -> None:
    assert names("loss", "parity") == ["parity-zero0", "parity-zero1", "parity-zero3", "parity-bfloat16", "loss"]
    assert names("right-128-fp8") == ["right-128-fp8"]
    assert names("right-128-fp8", dry=True) == ["right-128-fp8"], "though a dry run leaves it out"
    assert len(names()) == sum(len(part.variants) for part in plan.PARTS)
    assert set(names(dry=True)) < set(names())
    assert {name.split("-")[0] for name in names(dry=True)} == {part.name for part in plan.PARTS}


def test_an_unknown_part_is_one_line_that_lists_them() -> None:
    with pytest.raises(UserError) as error:
        names("loss", "lost", "right-32-fp8")
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("--only lost,right-32-fp8: no such part; the parts are right, ")
    assert all(part.name in str(error.value) for part in plan.PARTS)


def test_what_is_timed_runs_alone() -> None:
    def stages(dry: bool) -> Iterator[list[str]]:
        return ([task.name for task in stage] for stage in plan.stages(plan.tasks((), dry), dry))

    found = list(stages(False))
    assert found[0] == names("right", "compile_launches")
    assert found[1] == names("parity", "train", "kernel_tests")
    assert all(len(stage) == 1 for stage in found[2:])
    assert list(stages(True)) == [names(dry=True)]
