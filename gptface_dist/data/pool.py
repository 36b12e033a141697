"""Process many shards with several worker processes, in order."""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import TypeVar

from gptface_dist.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")

GRACE_S = 1.0
"""Seconds between a parent's death and the forced exit of its worker, for the removal of temporary files."""


def ordered(function: Callable[[Item], Result], items: Sequence[Item], workers: int) -> Iterator[Result]:
    """Yield ``function`` of every item in order, computed by ``workers`` spawned processes (1: by this process).

    The exception of one item ends the iteration; running items finish first, unless the user interrupts.
    """
    if workers < 1:
        raise UserError(f"at least 1 worker process is needed, not {workers}")
    workers = min(workers, len(items))
    if workers <= 1:
        yield from map(function, items)
        return
    rest = iter(items)
    others = set(multiprocessing.active_children())
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_follow_parent) as pool:
        waiting: deque[Future[Result]] = deque()
        try:
            # A few ahead, not all: results wait in memory for their turn.
            waiting.extend(pool.submit(_call, function, item) for item in islice(rest, 2 * workers))
            while waiting:
                yield waiting.popleft().result()
                waiting.extend(pool.submit(_call, function, item) for item in islice(rest, 1))
        except KeyboardInterrupt:
            for worker in set(multiprocessing.active_children()) - others:
                assert worker.pid is not None
                os.kill(worker.pid, signal.SIGINT)
            raise
        except BrokenProcessPool:
            raise UserError("a worker process was killed, perhaps for want of memory: try fewer --workers") from None
        finally:
            # It waits: after `wait=False` the `with` has no thread left to wait for, and CPython 3.11's exit may write to the
            # pipe that this thread is closing, a traceback after all is done.
            pool.shutdown(cancel_futures=True)


def _follow_parent() -> None:
    """Make a worker end on an interrupt or its parent's death, without a traceback or temporary files."""
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))

    def end() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        # A worker that waits for its next item may swallow the exit (seen with CPython 3.11's executor): force it, once a
        # running item has had time to remove its temporary files.
        time.sleep(GRACE_S)
        os._exit(130)

    when_parent_ends(end)


def when_parent_ends(act: Callable[[], object]) -> None:
    """Call ``act`` in a thread of this spawned process once its parent has ended, for whatever reason."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        act()

    threading.Thread(target=follow, daemon=True).start()


def _call(function: Callable[[Item], Result], item: Item) -> Result:
    try:
        return function(item)
    except SystemExit:
        # Interrupted: temporary files are removed by now; exit before the pool sends the next item.
        os._exit(130)
