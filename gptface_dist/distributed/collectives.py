"""Run a function on all ranks; if any rank fails, every rank raises the same error."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar, cast

import torch
import torch.distributed as dist

from gptface_dist.errors import Damaged, UserError, one_line

T = TypeVar("T")


class Failed(Exception):
    """A rank failed. The message is one line, the same on every rank."""


def barrier() -> None:
    """Wait until every rank calls it."""
    # Without a device NCCL guesses one by the rank's number.
    dist.barrier(device_ids=[torch.cuda.current_device()] if torch.cuda.is_available() else None)


@dataclass(frozen=True)
class RankGroup:
    """The ranks of a run, over a process group of their own."""

    group: dist.ProcessGroup | None = None
    """Of a backend for CPU tensors; None for one process alone."""

    @classmethod
    def of_world(cls) -> "RankGroup":
        """All ranks, over a new group. Every rank must call it."""
        return cls(dist.new_group(backend="gloo") if dist.is_initialized() else None)

    @property
    def rank(self) -> int:
        """This process's rank in the group."""
        return 0 if self.group is None else dist.get_rank(self.group)

    @property
    def size(self) -> int:
        """Number of ranks."""
        return 1 if self.group is None else dist.get_world_size(self.group)

    def all_gather(self, work: Callable[[], T]) -> list[T]:
        """Run ``work`` on every rank; all get all results in rank order. :class:`Failed` on all ranks if one fails."""
        local = _attempt(work)
        attempts: list[Any] = [local]
        if self.group is not None:
            attempts = [None] * self.size
            dist.all_gather_object(attempts, local, group=self.group)
        failures = [(rank, attempt) for rank, attempt in enumerate(attempts) if attempt.reason]
        if failures:
            rank, attempt = failures[0]
            others = f" (and {len(failures) - 1} ranks more)" if len(failures) > 1 else ""
            attempt.fail(f"rank {rank}: " if self.size > 1 else "", others)
        return [cast(T, attempt.result) for attempt in attempts]

    def on_rank0(self, work: Callable[[], T]) -> T:
        """Run ``work`` on rank 0; all get its result. :class:`Failed` on all ranks if it fails."""
        attempt: list[Any] = [_attempt(work) if self.rank == 0 else None]
        if self.group is not None:
            dist.broadcast_object_list(attempt, src=dist.get_global_rank(self.group, 0), group=self.group)
        if attempt[0].reason:
            attempt[0].fail()
        return cast(T, attempt[0].result)


@dataclass(frozen=True)
class _Attempt:
    """Result of one rank's work, or why it failed."""

    result: object = None
    reason: str = ""
    user_error: bool = False
    """Whether to raise :class:`UserError` rather than :class:`Failed`."""

    def fail(self, before: str = "", after: str = "") -> NoReturn:
        raise UserError(self.reason) if self.user_error else Failed(f"{before}{self.reason}{after}")


def _attempt(work: Callable[[], object]) -> _Attempt:
    try:
        return _Attempt(work())
    except Exception as error:
        return _Attempt(reason=describe(error), user_error=isinstance(error, UserError))


def describe(error: BaseException) -> str:
    """An exception in one line: its message if that was written for users, else its type too."""
    if isinstance(error, UserError | Failed | Damaged):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}" + (f": {error.filename}" if error.filename else "")
    return f"{type(error).__name__}: {one_line(error)}"
