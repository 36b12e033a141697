"""Start and end the processes of a run on this machine, one for each rank."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

from gptface_dist.distributed.rank import RankInfo
from gptface_dist.distributed.rendezvous import rendezvous_store
from gptface_dist.distributed.watchdog import ENDING

GRACE_S = 15.0
"""Seconds between the first failure, or a signal, and the forced end of the processes that are left."""
POLL_S = 0.05


def run(arguments: Sequence[str], world: int) -> int:
    """Start ``python -m gptface_dist.tools.main ARGUMENTS`` as ``world`` processes, and wait for all of them.

    Processes find each other by torchrun's variables. Each gets an equal share of the cores, unless ``OMP_NUM_THREADS``
    says otherwise. Signals that end a program are passed on to each. Returns the status of the first process that fails, as
    a shell tells it (128 + number after a signal), or 0.
    """
    with rendezvous_store(world) as ranks:
        return _run(arguments, ranks)


def _run(arguments: Sequence[str], ranks: Sequence[RankInfo]) -> int:
    environment = {**os.environ}
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // len(ranks))))
    command = [sys.executable, "-m", "gptface_dist.tools.main", *arguments]
    processes: list[subprocess.Popen[bytes]] = []
    with _received() as signals:
        try:
            for rank_info in ranks:
                # In a group of its own: a terminal sends its interrupt to this process alone, which passes it on once.
                own = {**environment, **rank_info.variables()}
                processes.append(subprocess.Popen(command, env=own, process_group=0))
            failed = _wait(processes, signals)
        finally:
            for process in processes:
                process.kill()
                process.wait()
    failed = failed or next((process.returncode for process in processes if process.returncode), 0)
    return 128 - failed if failed < 0 else failed


def _wait(processes: Sequence[subprocess.Popen[bytes]], signals: list[int]) -> int:
    """Wait until all have ended, or the grace time is over; status of the first that failed, minus the number of a signal."""
    failed, deadline = 0, float("inf")
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        ending = bool(signals)
        while signals:
            number = signals.pop()
            for process in processes:
                process.send_signal(number)
        if not failed:
            failed = next((process.returncode for process in processes if process.returncode), 0)
        if (failed or ending) and deadline == float("inf"):
            deadline = time.monotonic() + GRACE_S
        time.sleep(POLL_S)
    return failed


@contextlib.contextmanager
def _received() -> Iterator[list[int]]:
    """Collect the numbers of ending signals instead of obeying them; ignored ones (``nohup``) stay ignored."""
    numbers: list[int] = []
    before = {number: signal.getsignal(number) for number in ENDING}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, lambda received, _: numbers.append(received))
    try:
        yield numbers
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
