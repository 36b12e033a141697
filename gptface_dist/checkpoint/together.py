"""Ranks that do something together: all of them succeed, or all of them learn why not."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch.distributed as dist

from gptface_dist.errors import UserError

T = TypeVar("T")


class Failed(Exception):
    """Something failed on some rank. The message is one line, the same on every rank."""


@dataclass(frozen=True)
class Ranks:
    """The ranks of a run, talking over a group of their own."""

    group: dist.ProcessGroup | None = None
    """Of a backend for CPU tensors; None in a process that is alone."""

    @classmethod
    def of_world(cls) -> "Ranks":
        """All ranks, over a new group. All of them call it."""
        return cls(dist.new_group(backend="gloo") if dist.is_initialized() else None)

    @property
    def rank(self) -> int:
        """This rank."""
        return 0 if self.group is None else dist.get_rank(self.group)

    @property
    def size(self) -> int:
        """How many there are."""
        return 1 if self.group is None else dist.get_world_size(self.group)

    def everyone(self, work: Callable[[], T]) -> list[T]:
        """Every rank works; all get all results in rank order. :class:`Failed` on all ranks where one fails."""
        try:
            mine: tuple[T | None, str] = work(), ""
        except Exception as error:
            mine = None, line(error)
        found: list[Any] = [None] * self.size
        if self.group is None:
            found = [mine]
        else:
            dist.all_gather_object(found, mine, group=self.group)
        wrong = [f"rank {rank}: {reason}" if self.size > 1 else reason for rank, (_, reason) in enumerate(found) if reason]
        if wrong:
            raise Failed(wrong[0] + (f" (and {len(wrong) - 1} ranks more)" if len(wrong) > 1 else ""))
        return [cast(T, result) for result, _ in found]

    def first(self, work: Callable[[], T]) -> T:
        """Rank 0 works; all get its result. :class:`Failed` on all ranks where it fails."""
        found: list[Any] = [(None, "")]
        if self.rank == 0:
            try:
                found = [(work(), "")]
            except Exception as error:
                found = [(None, line(error))]
        if self.group is not None:
            dist.broadcast_object_list(found, src=dist.get_global_rank(self.group, 0), group=self.group)
        result, reason = found[0]
        if reason:
            raise Failed(reason)
        return cast(T, result)


def line(error: BaseException) -> str:
    """An exception in one line."""
    if isinstance(error, UserError | Failed):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}" + (f": {error.filename}" if error.filename else "")
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
