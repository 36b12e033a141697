"""One rank's failure ends the run everywhere: within seconds, with one message, and with a status that says so.

Ranks meet in a key-value store (``torch.distributed``'s, held by rank 0 or by who started them, as torchrun's agent does).
The first one that fails writes its reason there and prints it; a thread in every other process reads it and ends that
process at once, wherever it waits. A rank that is killed writes nothing: the others find their connections closed, see
whose signs of life have stopped, and name it.
"""

import datetime
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore

from gptface_dist.distributed.rank import Place
from gptface_dist.errors import UserError

FAILED = "failed"
BEAT = "beat/"
SECOND = 1.0
"""Between two signs of life, and two looks at the others'."""
PATIENCE = 4.0
"""How long a rank that lost its connections waits for one that knows why."""
LOST = ("connection", "peer", "socket", "broken pipe", "timed out", "timeout", "gloo", "nccl")
"""Words by which an error of a collective is known."""


class Watch:
    """This process's part. ``store`` is for ``init_process_group``."""

    def __init__(self, place: Place, timeout_s: float):
        self.place = place
        try:
            store: Any = TCPStore(
                place.address,
                place.port,
                place.world,
                is_master=place.rank == 0 and not place.held,
                timeout=datetime.timedelta(seconds=timeout_s),
                multi_tenant=True,
            )
        except (dist.DistError, RuntimeError, ValueError) as error:
            where = f"{place.address}:{place.port}"
            raise UserError(
                f"{place.world} processes did not meet at {where} in {timeout_s:g} s: {_line(error)}; were all of them started?"
            ) from None
        # torchrun keeps its store when it starts the processes anew: what an earlier attempt wrote is not ours.
        attempt = f"gptface/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        self.store: Any = PrefixStore(attempt, store)
        self._own: Any = PrefixStore(attempt, store.clone())
        self._ended = threading.Event()
        self._reporting = False
        self._thread = threading.Thread(target=self._look, daemon=True, name="watch")
        self._thread.start()

    def _look(self) -> None:
        beat = 0
        while not self._ended.wait(SECOND):
            beat += 1
            try:
                self._own.set(f"{BEAT}{self.place.rank}", str(beat))
                failed = self._own.check([FAILED]) and self._own.get(FAILED).decode()
            except (dist.DistError, RuntimeError):
                if not self._ended.wait(SECOND) and not self._reporting:
                    _end(f"{self.place} lost the process that holds the store (rank 0, or the one that started the ranks)", 1)
                return
            if failed:
                status, rank = failed.split(":")
                if int(rank) != self.place.rank:
                    self._linger()
                    _end("", int(status))

    def report(self, error: BaseException) -> int:
        """Tell the other ranks and, if this one is the first to know, print what happened. Returns the exit status."""
        self._reporting = True
        status = 2 if isinstance(error, UserError) else 130 if isinstance(error, KeyboardInterrupt) else 1
        message = "interrupted" if status == 130 else str(error) if status == 2 else _line(error)
        lost = status == 1 and any(word in message.lower() for word in LOST)
        if lost:
            message = self._why_lost(message)
        try:
            first = self._own.compare_set(FAILED, "", f"{status}:{self.place.rank}").decode().endswith(f":{self.place.rank}")
        except (dist.DistError, RuntimeError):
            first = True
        if first and status == 1 and not lost:
            traceback.print_exception(error)
        if first:
            print(f"gptface: {message if status == 2 else f'{self.place}: {message}'}", file=sys.stderr, flush=True)
        self._linger()
        return status

    def _linger(self) -> None:
        """Rank 0 may hold the store: it waits until the others have read it."""
        if self.place.rank == 0 and self.place.world > 1:
            time.sleep(3 * SECOND)

    def _why_lost(self, message: str) -> str:
        """Wait for a rank that knows more (this process then ends); else name those without signs of life."""
        before = self._beats()
        time.sleep(PATIENCE)
        after = self._beats()
        silent = [rank for rank in range(self.place.world) if rank != self.place.rank and before.get(rank) == after.get(rank)]
        who = f"rank {', '.join(map(str, silent))} died" if silent else "no rank died: was it slow?"
        return f"lost its connection to other ranks; {who} ({message})"

    def _beats(self) -> dict[int, bytes]:
        keys = {rank: f"{BEAT}{rank}" for rank in range(self.place.world)}
        try:
            return {rank: self.store.get(key) for rank, key in keys.items() if self.store.check([key])}
        except (dist.DistError, RuntimeError):
            return {}

    def close(self) -> None:
        """The run has ended."""
        self._ended.set()
        self._thread.join()


@contextmanager
def watched(place: Place, timeout_s: float) -> Iterator[Watch]:
    """Around everything that ranks do together; a failure inside ends this process with the run's status."""
    watch = Watch(place, timeout_s)
    try:
        yield watch
    except BaseException as error:
        if isinstance(error, SystemExit):
            raise
        # Without unwinding further: collectives of other threads may never return.
        _end("", watch.report(error))
    finally:
        watch.close()


def _end(message: str, status: int) -> None:
    if message:
        print(f"gptface: {message}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    # gloo begins with its source file, and ends with advice.
    reason = re.sub(r"^\[[^\]]*\] ", "", lines[0] if lines else "").split(". This is typically")[0]
    return f"{type(error).__name__}: {reason}"
