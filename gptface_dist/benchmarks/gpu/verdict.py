"""What a task's records say about it, and the rule of the exit status.

Status 0 needs of every correctness task that it ended by itself, that it checked something, and that no check failed or
could not be made; of the others only that no check of theirs failed. Slow, missing and failed measurements change nothing,
but in a dry run: there they are faults of the code, which a GPU would meet.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from gptface_dist.benchmarks.gpu.plan import Task
from gptface_dist.benchmarks.gpu.records import Recorded

ENDED = "ended"
"""How a task ended that was neither killed nor failed."""


@dataclass(frozen=True)
class Result:
    """A task with what its file holds."""

    task: Task
    """The task."""
    file: Recorded = field(default_factory=lambda: Recorded([]))
    """Its records."""

    @cached_property
    def origin(self) -> dict[str, Any]:
        """The record at the head: device, date, versions; empty where there is none."""
        return next(iter(self.of("begin")), {})

    @cached_property
    def end(self) -> dict[str, Any] | None:
        """The driver's last word on it (``how``); None where the driver was killed too."""
        return next((one for one in reversed(self.file.records) if one["kind"] == "end"), None)

    @property
    def checks(self) -> list[dict[str, Any]]:
        """Everything that was found right or wrong."""
        return self.of("check")

    @property
    def wrong(self) -> list[dict[str, Any]]:
        """Checks that failed."""
        return [one for one in self.checks if one.get("ok") is not True]

    def of(self, kind: str) -> list[dict[str, Any]]:
        """The records of a kind."""
        return [one for one in self.file.records if one["kind"] == kind]

    @property
    def problems(self) -> list[str]:
        """Why this task alone makes the status 1; empty where it does not."""
        found = [f"{len(self.wrong)} of {len(self.checks)} checks failed"] if self.wrong else []
        if not self.task.part.correctness and not self.origin.get("dry"):
            return found
        if self.of("failed"):
            found.append(f"{len(self.of('failed'))} could not be made")
        if not self.file.records:
            return ["nothing was recorded"]
        if self.end is None:
            found.append("has no end: the command was killed, or it is still running")
        elif self.end.get("how") != ENDED:
            found.append(str(self.end.get("how")))
        if self.file.damaged:
            found.append(f"{self.file.damaged} records cannot be read")
        if self.task.part.correctness and not self.checks and not found:
            found.append("checked nothing")
        return found


def right(results: Sequence[Result]) -> bool:
    """Whether the exit status is 0."""
    return not any(result.problems for result in results)
