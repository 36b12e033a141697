"""Ranks that do something together: all of them succeed, or all of them learn why not."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar, cast

import torch.distributed as dist

from gptface_dist.checkpoint.manifest import Damaged
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
        """Every rank works; all get all results in rank order. Where one fails, :class:`Failed` on all ranks."""
        mine = _attempt(work)
        found: list[Any] = [mine]
        if self.group is not None:
            found = [None] * self.size
            dist.all_gather_object(found, mine, group=self.group)
        wrong = [(rank, one) for rank, one in enumerate(found) if one.reason]
        if wrong:
            rank, one = wrong[0]
            others = f" (and {len(wrong) - 1} ranks more)" if len(wrong) > 1 else ""
            one.fail(f"rank {rank}: " if self.size > 1 else "", others)
        return [cast(T, one.result) for one in found]

    def first(self, work: Callable[[], T]) -> T:
        """Rank 0 works; all get its result. Where it fails, :class:`Failed` on all ranks."""
        found: list[Any] = [_attempt(work) if self.rank == 0 else None]
        if self.group is not None:
            dist.broadcast_object_list(found, src=dist.get_global_rank(self.group, 0), group=self.group)
        if found[0].reason:
            found[0].fail()
        return cast(T, found[0].result)


@dataclass(frozen=True)
class _Attempt:
    """What became of one rank's work."""

    result: object = None
    reason: str = ""
    users: bool = False
    """Whether it was a user's mistake: that stays a :class:`UserError`."""

    def fail(self, before: str = "", after: str = "") -> NoReturn:
        raise UserError(self.reason) if self.users else Failed(f"{before}{self.reason}{after}")


def _attempt(work: Callable[[], object]) -> _Attempt:
    try:
        return _Attempt(work())
    except Exception as error:
        return _Attempt(reason=line(error), users=isinstance(error, UserError))


def line(error: BaseException) -> str:
    """An exception in one line."""
    if isinstance(error, UserError | Failed | Damaged):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}" + (f": {error.filename}" if error.filename else "")
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
