"""Runs fake parts as ``gptface bench gpu`` runs the true ones."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from gptface_dist.benchmarks.gpu import driver, plan, records
from gptface_dist.benchmarks.gpu.plan import ALONE, Part
from gptface_dist.benchmarks.gpu.verdict import Result

VARIANTS = ("ok", "wrong", "raising", "poisoned", "uncaught", "crash", "hang", "silent", "impatient", "endless")
FAKE = Part("fake", 10, "together", True, VARIANTS, package="tests.benchmarks")
SPEED = replace(FAKE, name="fake_speed", stage=ALONE, correctness=False)
PARTS = (FAKE, SPEED)


def run(out: Path, *names: str, seconds: float = 10, total: float = 100) -> tuple[dict[str, Result], list[str]]:
    """Run tasks of the fake parts: name -> result, and the lines that were said."""
    said: list[str] = []
    parts = tuple(replace(part, seconds=seconds / plan.DRY_FACTOR) for part in PARTS)
    tasks = plan.tasks(names, dry=True, parts=parts)
    driver.run(tasks, driver.Options(out, driver.checkout(), total, dry=True), said.append, parts)
    return {result.task.name: result for result in driver.results(out, tasks)}, said


def kinds(result: Result) -> list[str]:
    return [one["kind"] for one in result.file.records]


def numbers(file: Path) -> list[int]:
    return [one["number"] for one in records.read(file).records if one["kind"] == "number"]


def until(happens: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
