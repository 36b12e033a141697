"""One rank's failure ends the run everywhere: within seconds, with one message, and with a status that says so.

Ranks share a key-value store (``torch.distributed``'s, served by rank 0 or by the launcher, as torchrun's agent does).
The first one that fails writes its status there and prints its reason; a thread in every other process reads it and ends that
process at once, wherever it waits. A rank that is killed writes nothing: the others find their connections closed, see
whose heartbeat has stopped, and name it.
"""

import contextlib
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NoReturn

import torch.distributed as dist

from gptface_dist.distributed import rendezvous
from gptface_dist.distributed.rank import RankInfo
from gptface_dist.errors import UserError

FAILED = "failed"
BEAT = "beat/"
SECOND = 1.0
"""Between two heartbeats, and two reads of the store."""
PATIENCE = 4.0
"""Seconds that a rank which lost its connections waits for one that knows why."""
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that end a program: of a terminal, of a scheduler, of a closed terminal."""
LOST = ("connection", "peer", "socket", "broken pipe", "timed out", "timeout", "gloo", "nccl")
"""Words that mark an error of a collective."""


class Signalled(BaseException):
    """One of :data:`ENDING` has arrived."""

    def __init__(self, number: int):
        super().__init__()
        self.number = number


class Watchdog:
    """A context manager around everything that ranks do together: a failure inside ends this process with the run's status.

    ``store`` is for ``init_process_group``.
    """

    def __init__(self, rank_info: RankInfo, timeout_s: float):
        self.rank_info = rank_info
        self.store = rendezvous.connect(rank_info, timeout_s)
        # Of the thread's own: a client waits while it is used.
        self._own = self.store.clone()
        self._ended = threading.Event()
        self._reporting = self._signalled = False
        self._before: dict[signal.Signals, Any] = {}
        self._at_end: list[Callable[[], object]] = []
        self._thread = threading.Thread(target=self._poll, daemon=True, name="watchdog")
        self._thread.start()

    def __enter__(self) -> "Watchdog":
        for number in ENDING:
            if (before := signal.getsignal(number)) is not signal.SIG_IGN:
                self._before[number] = before
                signal.signal(number, self._on_signal)
        return self

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None) -> None:
        try:
            if error is not None and not isinstance(error, SystemExit):
                self._end("", self.report(error))
            self.close()
        except Signalled as signalled:
            # It came after the error: a peer that it has ended already.
            self._end("", self.report(signalled))
        for number, before in self._before.items():
            signal.signal(number, before)

    def _on_signal(self, number: int, _: object) -> None:
        if not self._reporting and not self._signalled:
            self._signalled = True
            raise Signalled(number)

    def on_end(self, work: Callable[[], object]) -> None:
        """Call ``work`` before this process ends by a failure, of its own or of another rank; maybe in another thread."""
        self._at_end.append(work)

    def _end(self, message: str, status: int) -> NoReturn:
        """End this process without unwinding: collectives of other threads may never return."""
        for work in self._at_end:
            with contextlib.suppress(Exception):
                work()
        if message:
            _print(message)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(status)

    def _poll(self) -> None:
        beat = 0
        while not self._ended.wait(SECOND):
            beat += 1
            try:
                self._own.set(f"{BEAT}{self.rank_info.rank}", str(beat))
                failed = _read_failure(self._own, self.rank_info)
            except (dist.DistError, RuntimeError):
                if not self._ended.wait(SECOND) and not self._reporting:
                    self._end(
                        f"{self.rank_info} lost the process that holds the store (rank 0, or the one that started the ranks)", 1
                    )
                return
            if failed and failed.rank != self.rank_info.rank:
                self._linger()
                self._end("", failed.status)

    def report(self, error: BaseException) -> int:
        """Write the failure to the store and, if no other rank has, print it. Returns the exit status."""
        self._reporting = True
        status = _status(error)
        message = _line(error) if status == 1 else _words(error)
        lost = status == 1 and any(word in message.lower() for word in LOST)
        if lost:
            message = self._why_lost(message)
        first = self._claim(_Failure(status, self.rank_info.rank))
        if first and status == 1 and not lost:
            with contextlib.suppress(OSError, ValueError):
                traceback.print_exception(error)
        if first:
            _print(f"{self.rank_info}: {message}" if status == 1 else message)
        self._linger()
        return status

    def _claim(self, failure: "_Failure") -> bool:
        """Write the failure to the store, unless another rank has written one. Returns whether this rank is the first."""
        signed = self.rank_info.token.sign(f"{failure.status}:{failure.rank}")
        try:
            self.store.compare_set(FAILED, "", signed)
            written = _read_failure(self.store, self.rank_info)
            if written is None:
                # Not a rank's: compare_set leaves whatever stands there.
                self.store.set(FAILED, signed)
            return written is None or written.rank == failure.rank
        except (dist.DistError, RuntimeError):
            return True

    def _linger(self) -> None:
        """Where rank 0 serves the store, it waits until the others have read it."""
        if self.rank_info.rank == 0 and self.rank_info.world > 1 and not self.rank_info.external_store:
            time.sleep(3 * SECOND)

    def _why_lost(self, message: str) -> str:
        """Wait for a rank that knows more (this process then ends); else name those whose heartbeat stopped."""
        before = self._beats()
        time.sleep(PATIENCE)
        after = self._beats()
        silent = [
            rank for rank in range(self.rank_info.world) if rank != self.rank_info.rank and before.get(rank) == after.get(rank)
        ]
        who = f"rank {', '.join(map(str, silent))} died" if silent else "no rank died: was it slow?"
        return f"lost its connection to other ranks; {who} ({message})"

    def _beats(self) -> dict[int, bytes]:
        keys = {rank: f"{BEAT}{rank}" for rank in range(self.rank_info.world)}
        try:
            return {rank: self.store.get(key) for rank, key in keys.items() if self.store.check([key])}
        except (dist.DistError, RuntimeError):
            return {}

    def close(self) -> None:
        """Stop watching: the run has ended."""
        self._ended.set()
        self._thread.join()


def _print(message: str) -> None:
    """One line on standard error; none where that is closed or full, which must not keep a process from ending."""
    with contextlib.suppress(OSError, ValueError):
        print(f"gptface: {message}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class _Failure:
    """Status of a failed run, and the rank that failed first."""

    status: int
    rank: int


def _read_failure(store: Any, rank_info: RankInfo) -> _Failure | None:
    """The failure in the store; None if there is none that a rank of the run has signed, with a failure's status."""
    if not store.check([FAILED]):
        return None
    text = rank_info.token.read(store.get(FAILED)) or ""
    match = re.fullmatch(r"([0-9]{1,3}):([0-9]{1,9})", text)
    if not match or not 0 < int(match[1]) < 256 or int(match[2]) >= rank_info.world:
        return None
    return _Failure(int(match[1]), int(match[2]))


def _status(error: BaseException) -> int:
    """Exit status after an error, as shells count: 128 and the number after a signal."""
    if isinstance(error, Signalled):
        return 128 + error.number
    return 2 if isinstance(error, UserError) else 1


def _words(error: BaseException) -> str:
    """Message of a user's mistake or a signal."""
    if not isinstance(error, Signalled):
        return str(error)
    return "interrupted" if error.number == signal.SIGINT else f"ended by {signal.Signals(error.number).name}"


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    # gloo begins with its source file, and ends with advice.
    reason = re.sub(r"^\[[^\]]*\] ", "", lines[0] if lines else "").split(". This is typically")[0]
    return f"{type(error).__name__}: {reason}"
