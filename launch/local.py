"""Start and end the processes of a run on this machine, one for each rank."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from gptface_dist.distributed.rank import RankInfo
from gptface_dist.distributed.rendezvous import ADDRESS, rendezvous_store

GRACE = 15.0
"""Seconds between the first failure and the forced end of the other processes."""


def run(arguments: Sequence[str], world: int) -> int:
    """Start ``python -m gptface_dist.tools.main ARGUMENTS`` as ``world`` processes; the status of the first that fails, or 0.

    Processes find each other by torchrun's variables. Each gets an equal share of the cores, unless ``OMP_NUM_THREADS``
    says otherwise. An interrupt reaches all of them.
    """
    with rendezvous_store() as port:
        return _run(arguments, [RankInfo(rank, world, rank, ADDRESS, port, external_store=True) for rank in range(world)])


def _run(arguments: Sequence[str], ranks: Sequence[RankInfo]) -> int:
    environment = {**os.environ}
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // len(ranks))))
    command = [sys.executable, "-m", "gptface_dist.tools.main", *arguments]
    processes = [subprocess.Popen(command, env={**environment, **rank_info.variables()}) for rank_info in ranks]
    failed, deadline = 0, float("inf")
    try:
        while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
            if not failed:
                failed = next((process.returncode for process in processes if process.returncode), 0)
                deadline = time.monotonic() + GRACE if failed else deadline
            time.sleep(0.05)
    except KeyboardInterrupt:
        # The terminal sends the interrupt to all processes: they save a checkpoint and end.
        _wait(processes, GRACE)
        failed = 130
    finally:
        for process in processes:
            process.kill()
            process.wait()
    failed = failed or next((process.returncode for process in processes if process.returncode), 0)
    return 128 - failed if failed < 0 else failed


def _wait(processes: Sequence[subprocess.Popen[bytes]], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        time.sleep(0.05)
    for process in processes:
        process.send_signal(signal.SIGTERM)
