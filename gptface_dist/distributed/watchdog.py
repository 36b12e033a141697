"""One rank's failure ends the run everywhere: within seconds, with one message, and with a status that says so.

Ranks share a key-value store (``torch.distributed``'s, served by rank 0 or by the launcher, as torchrun's agent does).
The first one that fails writes its status there and prints its reason; a thread in every other process reads it and ends that
process at once, wherever it waits. A rank that is killed writes nothing: the others find their connections closed, see
whose heartbeat has stopped, and name it.
"""

import datetime
import os
import re
import sys
import threading
import time
import traceback
from types import TracebackType
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore

from gptface_dist.distributed.rank import RankInfo
from gptface_dist.errors import UserError

FAILED = "failed"
BEAT = "beat/"
SECOND = 1.0
"""Between two heartbeats, and two reads of the store."""
PATIENCE = 4.0
"""Seconds that a rank which lost its connections waits for one that knows why."""
LOST = ("connection", "peer", "socket", "broken pipe", "timed out", "timeout", "gloo", "nccl")
"""Words that mark an error of a collective."""


class Watchdog:
    """A context manager around everything that ranks do together: a failure inside ends this process with the run's status.

    ``store`` is for ``init_process_group``.
    """

    def __init__(self, rank_info: RankInfo, timeout_s: float):
        self.rank_info = rank_info
        try:
            store: Any = TCPStore(
                rank_info.address,
                rank_info.port,
                rank_info.world,
                is_master=rank_info.rank == 0 and not rank_info.external_store,
                timeout=datetime.timedelta(seconds=timeout_s),
                multi_tenant=True,
            )
        except (dist.DistError, RuntimeError, ValueError) as error:
            where = f"{rank_info.address}:{rank_info.port} in {timeout_s:g} s"
            raise UserError(
                f"{rank_info.world} processes did not meet at {where}: {_line(error)}; were all of them started?"
            ) from None
        # torchrun keeps its store when it starts the processes anew: what an earlier attempt wrote is not ours.
        attempt = f"gptface/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        self.store: Any = PrefixStore(attempt, store)
        self._own: Any = PrefixStore(attempt, store.clone())
        self._ended = threading.Event()
        self._reporting = False
        self._thread = threading.Thread(target=self._poll, daemon=True, name="watchdog")
        self._thread.start()

    def __enter__(self) -> "Watchdog":
        return self

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None) -> None:
        if error is not None and not isinstance(error, SystemExit):
            # Without unwinding further: collectives of other threads may never return.
            _end("", self.report(error))
        self.close()

    def _poll(self) -> None:
        beat = 0
        while not self._ended.wait(SECOND):
            beat += 1
            try:
                self._own.set(f"{BEAT}{self.rank_info.rank}", str(beat))
                failed = self._own.check([FAILED]) and self._own.get(FAILED).decode()
            except (dist.DistError, RuntimeError):
                if not self._ended.wait(SECOND) and not self._reporting:
                    _end(
                        f"{self.rank_info} lost the process that holds the store (rank 0, or the one that started the ranks)", 1
                    )
                return
            if failed:
                status, rank = failed.split(":")
                if int(rank) != self.rank_info.rank:
                    self._linger()
                    _end("", int(status))

    def report(self, error: BaseException) -> int:
        """Write the failure to the store and, if no other rank has, print it. Returns the exit status."""
        self._reporting = True
        status = 2 if isinstance(error, UserError) else 130 if isinstance(error, KeyboardInterrupt) else 1
        message = "interrupted" if status == 130 else str(error) if status == 2 else _line(error)
        lost = status == 1 and any(word in message.lower() for word in LOST)
        if lost:
            message = self._why_lost(message)
        try:
            first = (
                self._own.compare_set(FAILED, "", f"{status}:{self.rank_info.rank}")
                .decode()
                .endswith(f":{self.rank_info.rank}")
            )
        except (dist.DistError, RuntimeError):
            first = True
        if first and status == 1 and not lost:
            traceback.print_exception(error)
        if first:
            print(f"gptface: {message if status == 2 else f'{self.rank_info}: {message}'}", file=sys.stderr, flush=True)
        self._linger()
        return status

    def _linger(self) -> None:
        """Rank 0 may serve the store: it waits until the others have read it."""
        if self.rank_info.rank == 0 and self.rank_info.world > 1:
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
