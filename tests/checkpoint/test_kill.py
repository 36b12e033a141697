"""A process killed at any moment of saving never loses the last published checkpoint, and never publishes a broken one."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gptface_dist.checkpoint.folder import FOLDER_NAME, name_of, published, tidy
from gptface_dist.checkpoint.load import damage, find
from gptface_dist.checkpoint.manifest import MANIFEST_NAME
from gptface_dist.distributed.collectives import RankGroup
from tests.checkpoint.fake_state import read, tiny, write

Trial = Callable[..., dict[str, Any]]
PHASES = {
    "nothing was written",
    "among the tensors",
    "tensors without a manifest",
    "complete, not published",
    "its forerunner put aside, not published",
    "published, not pointed to",
    "pointed to, the old one not yet deleted",
    "half deleted",
    "done",
}

MORE = 12
"""Acts that clearing what the last trial left may take."""


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trial]:
    """Runs one trial in the server."""
    root = Path(__file__).parents[2]
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.checkpoint.crash_server", str(tmp_path_factory.mktemp("warm"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=root,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert server.stdin
    assert server.stdout
    assert server.stdout.readline() == "ready\n"

    def run(folder: Path, step: int, value: float, left: int = 0, delay: float = 0.0) -> dict[str, Any]:
        assert server.stdin
        assert server.stdout
        server.stdin.write(json.dumps([str(folder), step, value, left, delay]) + "\n")
        server.stdin.flush()
        found: dict[str, Any] = json.loads(server.stdout.readline())
        return found

    yield run
    server.stdin.close()
    server.wait(60)


def phase(checkpoints: Path, step: int, before: str) -> str:
    """Where the process was killed, by what it left."""
    new, old = checkpoints / f".{name_of(step)}.new", checkpoints / f".{name_of(step)}.old"
    if new.exists():
        if (new / MANIFEST_NAME).exists() and (new / MANIFEST_NAME).read_text().endswith("}\n"):
            return "its forerunner put aside, not published" if old.exists() else "complete, not published"
        return "tensors without a manifest" if (new / "state" / ".metadata").exists() else "among the tensors"
    if (checkpoints / "latest").read_text() == before:
        return "published, not pointed to" if old.exists() or (checkpoints / name_of(step)).exists() else "nothing was written"
    if list(checkpoints.glob(".*.gone")):
        return "half deleted"
    return "pointed to, the old one not yet deleted" if old.exists() or len(published(checkpoints)) > 1 else "done"


class Run:
    """A run whose saves are killed; it knows which numbers may be found afterwards."""

    def __init__(self, folder: Path):
        self.folder, self.checkpoints = folder, folder / FOLDER_NAME
        self.step, self.value = 1, 0.0
        self.phases: dict[str, int] = {}
        write(folder, tiny(self.value), self.step)

    def check(self, step: int, value: float, before: str) -> None:
        """After a save of ``value`` at ``step`` was killed: the latest is that or the one before, and is whole."""
        where = phase(self.checkpoints, step, before)
        self.phases[where] = self.phases.get(where, 0) + 1
        latest, _ = find(self.checkpoints, RankGroup(), previous=False)
        assert latest is not None
        state = read(latest, tiny(-1.0))
        new = state.equals(tiny(value))
        assert new or state.equals(tiny(self.value)), where
        if new:
            self.step, self.value = step, value
        # Whatever has a checkpoint's name is one.
        found = published(self.checkpoints)
        assert [damage(path, RankGroup()) for path in found] == [""] * len(found), where
        assert self.phases.keys() <= PHASES


def test_killed_at_every_act_and_at_random_moments(trial: Trial, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    # How many acts a whole save has, onto a new step and onto one that exists.
    acts = [trial(tmp_path / "count", step, 0.0)["acts"] for step in (1, 2, 2)]
    assert min(acts) > 20
    plan = [(again, left, 0.0) for again in (False, True) for left in range(1, acts[1 + again] + MORE)]
    rng = random.Random(0)
    plan += [(rng.random() < 0.5, 0, rng.uniform(0.001, 0.05)) for _ in range(50)]
    rng.shuffle(plan)
    killed = number = 0
    # Whether one outlives its delay, and what the next one then has to clear away first, depends on the machine: past the
    # plan there are more, until a hundred were killed and every phase was met.
    while number < len(plan) or killed < 100 or not run.phases.keys() | {"done"} >= PHASES:
        assert number < 1000, (killed, PHASES - run.phases.keys())
        if number == len(plan):
            again = rng.random() < 0.5
            plan.append((again, rng.randrange(1, acts[1 + again] + MORE), 0.0))
        again, left, delay = plan[number]
        number += 1
        before = (run.checkpoints / "latest").read_text()
        step = run.step if again else run.step + 1
        killed += trial(run.folder, step, float(number), left, delay)["killed"]
        run.check(step, float(number), before)
    # And afterwards the next save works, and leaves nothing behind.
    write(run.folder, tiny(-5.0), run.step + 1)
    tidy(run.checkpoints)
    assert not list(run.checkpoints.glob(".*"))
    assert read(run.checkpoints / name_of(run.step + 1), tiny(-1.0)).equals(tiny(-5.0))
